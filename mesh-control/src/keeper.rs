//! Keeps identity in order while the control plane runs: reads changed files, renews certificates, publishes what is in
//! force. The only writer of all of it. What cannot be used is refused, logged and counted, and the former stays, except
//! for revocations: without them nobody is believed.

use std::{
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use anyhow::Context as _;
use rustls::{ServerConfig, server::NoServerSessionStorage};
use tokio::{sync::watch, time::sleep};
use tracing::{info, warn};

use crate::{
    auth::{JoinTokens, Rules, TokenKeys, TokenRules},
    ca::{self, Authority, Files, Trust},
    config::Config,
    metrics::Metrics,
};

/// Files are looked at this often, and taken when two looks found the same: who copies several needs a moment.
const LOOK: Duration = Duration::from_millis(500);
/// A renewal is under way, or failed, this long.
const RETRY: Duration = Duration::from_secs(60);
/// Revocation lists of large authorities take megabytes.
const MAX_LENGTH: u64 = 64 << 20;
/// Names of the server's certificate besides those given.
const NAMES: [&str; 6] = [
    "mesh-control",
    "localhost",
    "mesh-control.mesh-system.svc",
    "istiod.istio-system.svc",
    "127.0.0.1",
    "::1",
];

/// What is in force.
pub(crate) struct InForce {
    pub(crate) authority: Arc<Authority>,
    pub(crate) trust: Arc<Trust>,
    pub(crate) tls: Arc<ServerConfig>,
    joins: Arc<JoinTokens>,
    keys: Option<Arc<TokenKeys>>,
    rules: Option<Arc<TokenRules>>,
    trust_domain: Arc<str>,
}

impl InForce {
    /// What callers are judged by.
    pub(crate) fn rules(&self) -> Rules<'_> {
        Rules {
            trust: &self.trust,
            trust_domain: &self.trust_domain,
            joins: &self.joins,
            tokens: self.rules.as_deref().zip(self.keys.as_deref()),
        }
    }
}

/// A file, or several, as looked at.
struct Looked<T> {
    judged: T,
    last: T,
}

impl<T: PartialEq + Clone> Looked<T> {
    fn new(first: T) -> Self {
        Self { judged: first.clone(), last: first }
    }

    /// Whether `now` is new, and was the same the last time.
    fn settled(&mut self, now: T) -> bool {
        let same = self.last == now;
        self.last = now;
        if same && self.judged != self.last {
            self.judged = self.last.clone();
            return true;
        }
        false
    }
}

type Content = Result<Vec<u8>, String>;

/// The keeper of what is in force.
pub(crate) struct Keeper {
    config: Config,
    metrics: Arc<Metrics>,
    publish: watch::Sender<Arc<InForce>>,
    authority: Looked<Result<Option<Files>, String>>,
    crl: Looked<Option<Content>>,
    joins: Looked<Option<Content>>,
    keys: Looked<Option<Content>>,
    /// When half of the server certificate's life is over.
    renew: SystemTime,
    /// The issuing certificate is not renewed before this.
    renew_issuer: SystemTime,
}

impl Keeper {
    /// Reads everything, and makes an authority where there is none.
    ///
    /// # Errors
    /// When anything cannot be used; the message names the option.
    pub(crate) fn start(config: Config, metrics: Arc<Metrics>, now: SystemTime) -> anyhow::Result<Self> {
        let rules = rules(&config)?;
        let about = || format!("--ca-dir {}", config.ca_dir.display());
        let files = open(&config.ca_dir, now).with_context(about)?;
        let authority = Arc::new(Authority::load(&files, now).with_context(about)?);
        let crl = config.crl.as_deref().map(content);
        if let (Some(path), Some(Err(reason))) = (&config.crl, &crl) {
            anyhow::bail!("--crl {}: {reason}", path.display());
        }
        let trust = Trust::new(&authority, &crl)?;
        if let Some(reason) = trust.broken() {
            anyhow::bail!("--crl: {reason}");
        }
        let joins = config.join_tokens.as_deref().map(content);
        let keys = config.token_jwks.as_deref().map(content);
        let parsed_joins = parse_joins(&joins).map_err(anyhow::Error::msg).context("--join-tokens")?;
        let parsed_keys = parse_keys(&keys).map_err(anyhow::Error::msg).context("--token-jwks")?;
        if rules.is_none() && parsed_joins.len() == 0 {
            warn!("no agent can join: neither --join-tokens nor --token-issuer is given");
        }
        let (tls, renew) = server(&authority, &trust, &config, now)?;
        let in_force = InForce {
            authority,
            trust: Arc::new(trust),
            tls,
            joins: Arc::new(parsed_joins),
            keys: parsed_keys.map(Arc::new),
            rules: rules.map(Arc::new),
            trust_domain: config.trust_domain.as_str().into(),
        };
        let keeper = Self {
            publish: watch::Sender::new(Arc::new(in_force)),
            authority: Looked::new(Ok(Some(files))),
            crl: Looked::new(crl),
            joins: Looked::new(joins),
            keys: Looked::new(keys),
            renew,
            renew_issuer: now,
            config,
            metrics,
        };
        keeper.show();
        Ok(keeper)
    }

    /// What is in force, now and later.
    pub(crate) fn subscribe(&self) -> watch::Receiver<Arc<InForce>> {
        self.publish.subscribe()
    }

    /// Looks at the files until told to stop.
    pub(crate) async fn run(mut self, stop: impl Future<Output = ()>) -> anyhow::Result<()> {
        tokio::pin!(stop);
        loop {
            tokio::select! {
                () = &mut stop => return Ok(()),
                () = sleep(LOOK) => {}
            }
            let look = move || {
                self.look(SystemTime::now());
                self
            };
            self = tokio::task::spawn_blocking(look).await.context("looking at certificates")?;
        }
    }

    fn look(&mut self, now: SystemTime) {
        self.renew_issuer(now);
        let files = ca::read(&self.config.ca_dir);
        let changed = self.authority.settled(files);
        let revoked = self.crl.settled(self.config.crl.as_deref().map(content));
        let former = Arc::clone(&self.publish.borrow());
        let mut authority = Arc::clone(&former.authority);
        let mut differs = false;
        if changed {
            let loaded = match &self.authority.judged {
                Ok(Some(files)) => Authority::load(files, now).map_err(|error| error.to_string()),
                Ok(None) => Err("its files are gone".to_owned()),
                Err(reason) => Err(reason.clone()),
            };
            match loaded {
                Ok(loaded) => (authority, differs) = (Arc::new(loaded), true),
                Err(reason) => self.refuse("ca_dir", &reason),
            }
        }
        let mut trust = Arc::clone(&former.trust);
        if differs || revoked {
            match Trust::new(&authority, &self.crl.judged) {
                Ok(new) => {
                    if let Some(reason) = new.broken() {
                        self.refuse("crl", &format!("{reason}; every certificate of a caller is refused"));
                    }
                    (trust, differs) = (Arc::new(new), true);
                }
                Err(error) => return self.refuse("ca_dir", &error.to_string()),
            }
        }
        let mut joins = Arc::clone(&former.joins);
        if self.joins.settled(self.config.join_tokens.as_deref().map(content)) {
            match parse_joins(&self.joins.judged) {
                Ok(parsed) => (joins, differs) = (Arc::new(parsed), true),
                Err(reason) => self.refuse("join_tokens", &reason),
            }
        }
        let mut keys = former.keys.clone();
        if self.keys.settled(self.config.token_jwks.as_deref().map(content)) {
            match parse_keys(&self.keys.judged) {
                Ok(parsed) => (keys, differs) = (parsed.map(Arc::new), true),
                Err(reason) => self.refuse("token_jwks", &reason),
            }
        }
        // A clock that was set back is no reason to go on with a certificate from the future.
        let early = self.renew.checked_sub(self.config.certificate_lifetime).is_some_and(|start| now < start);
        if !differs && now < self.renew && !early {
            return;
        }
        match server(&authority, &trust, &self.config, now) {
            Ok((tls, renew)) => {
                self.renew = renew;
                let (rules, trust_domain) = (former.rules.clone(), Arc::clone(&former.trust_domain));
                let new = InForce { authority, trust, tls, joins, keys, rules, trust_domain };
                info!(roots = new.authority.roots(), "certificates and credentials taken into force");
                self.publish.send_replace(Arc::new(new));
                self.show();
            }
            Err(error) => {
                self.renew = now + Duration::from_secs(10);
                self.refuse("server_certificate", &format!("{error:#}"));
            }
        }
    }

    /// An authority that was made here renews its issuing certificate, as long as the key of the root is there.
    fn renew_issuer(&mut self, now: SystemTime) {
        let due = now >= self.renew_issuer.max(self.publish.borrow().authority.half_life());
        if !due || !self.config.ca_dir.join(ca::ROOT_KEY).exists() {
            return;
        }
        // New files are in force only when they have settled.
        self.renew_issuer = now + RETRY;
        match ca::rotation::new_issuer(&self.config.ca_dir, now) {
            Ok(()) => info!("a new issuing certificate was made"),
            Err(error) => self.refuse("ca_dir", &format!("renewing the issuing certificate: {error:#}")),
        }
    }

    fn refuse(&self, what: &'static str, reason: &str) {
        warn!(what, reason, "refused; what was in force stays");
        self.metrics.refused_files.with_label_values(&[what]).inc();
    }

    fn show(&self) {
        let in_force = self.publish.borrow();
        let end = in_force.authority.not_after().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        self.metrics.issuer_end.set(i64::try_from(end.as_secs()).unwrap_or(i64::MAX));
        self.metrics.roots.set(i64::try_from(in_force.authority.roots()).unwrap_or(i64::MAX));
    }
}

/// Reads the authority's directory, after making what is missing.
fn open(dir: &Path, now: SystemTime) -> anyhow::Result<Files> {
    // The directory of the user's own authority may be read-only: then there is nothing to heal.
    match ca::lock(dir) {
        Ok(lock) => {
            ca::heal(dir)?;
            if ca::read(dir).map_err(anyhow::Error::msg)?.is_none() {
                ca::write(dir, &ca::create_first(now)?)?;
                info!(dir = %dir.display(), "a new certificate authority was made");
            }
            drop(lock);
        }
        Err(error) => {
            let there = ca::read(dir).map_err(anyhow::Error::msg)?.is_some();
            if !there {
                return Err(error).context("making a certificate authority");
            }
        }
    }
    let key = dir.join(ca::KEY);
    if std::fs::metadata(&key).is_ok_and(|metadata| metadata.permissions().mode() & 0o077 != 0) {
        warn!(key = %key.display(), "others than the owner may read this key");
    }
    ca::read(dir).map_err(anyhow::Error::msg)?.context("its files are gone")
}

fn rules(config: &Config) -> anyhow::Result<Option<TokenRules>> {
    match (&config.token_issuer, &config.token_jwks) {
        (None, None) => Ok(None),
        (Some(_), None) => anyhow::bail!("--token-issuer needs --token-jwks"),
        (None, Some(_)) => anyhow::bail!("--token-jwks needs --token-issuer"),
        (Some(issuer), Some(_)) => Ok(Some(TokenRules {
            issuer: issuer.clone(),
            audience: config.token_audience.clone(),
            service_accounts: config.token_service_account.clone(),
        })),
    }
}

fn server(
    authority: &Authority,
    trust: &Trust,
    config: &Config,
    now: SystemTime,
) -> anyhow::Result<(Arc<ServerConfig>, SystemTime)> {
    let mut names: Vec<String> = NAMES.map(str::to_owned).to_vec();
    names.extend(config.tls_name.iter().cloned());
    let identity = authority.server(&names, config.certificate_lifetime, now).context("--tls-name")?;
    let life = identity.not_after.duration_since(now).unwrap_or_default();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut tls = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(Arc::new(trust.clone()))
        .with_single_cert(identity.chain, identity.key)?;
    tls.alpn_protocols = vec![b"h2".to_vec()];
    // A resumed session would bring a certificate along that may have been revoked since.
    tls.session_storage = Arc::new(NoServerSessionStorage {});
    tls.send_tls13_tickets = 0;
    Ok((Arc::new(tls), now + life / 2))
}

fn content(path: &Path) -> Content {
    let about = |error: std::io::Error| format!("{}: {error}", path.display());
    let length = std::fs::metadata(path).map_err(about)?.len();
    if length > MAX_LENGTH {
        return Err(format!("{}: longer than {MAX_LENGTH} bytes", path.display()));
    }
    std::fs::read(path).map_err(about)
}

fn text(content: &Content) -> Result<&str, String> {
    std::str::from_utf8(content.as_ref().map_err(String::clone)?).map_err(|error| error.to_string())
}

fn parse_joins(content: &Option<Content>) -> Result<JoinTokens, String> {
    let Some(content) = content else { return Ok(JoinTokens::default()) };
    JoinTokens::parse(text(content)?).map_err(|error| error.to_string())
}

fn parse_keys(content: &Option<Content>) -> Result<Option<TokenKeys>, String> {
    content.as_ref().map(|content| TokenKeys::parse(text(content)?)).transpose()
}

/// Where the roots are.
pub(crate) fn roots(dir: &Path) -> PathBuf {
    dir.join(ca::ROOTS)
}

#[cfg(test)]
mod tests;
