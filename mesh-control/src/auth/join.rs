//! Join tokens: `NODE TOKEN` in each line, NODE being `*` for any node. Pure.

use aws_lc_rs::{constant_time::verify_slices_are_equal, digest};

use crate::identity::is_name;

/// Shorter ones could be guessed.
const MIN_LENGTH: usize = 16;

/// The tokens, as hashes: equal in length, and of no use to whoever reads this memory.
#[derive(Debug, Default)]
pub(crate) struct JoinTokens(Vec<(digest::Digest, Option<String>)>);

/// For which node a token is.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Node<'a> {
    Any,
    One(&'a str),
}

/// A line that cannot be used.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {reason}")]
pub(crate) struct BadLine {
    line: usize,
    reason: String,
}

impl JoinTokens {
    /// Reads the file's text; a single bad line refuses it.
    pub(crate) fn parse(text: &str) -> Result<Self, BadLine> {
        let mut tokens = Vec::new();
        for (at, line) in text.lines().enumerate() {
            let bad = |reason: String| BadLine { line: at + 1, reason };
            let mut words = line.split_whitespace().take_while(|word| !word.starts_with('#'));
            let (node, token) = match (words.next(), words.next(), words.next()) {
                (None, _, _) => continue,
                (Some(node), Some(token), None) => (node, token),
                _ => return Err(bad("is not NODE TOKEN".to_owned())),
            };
            let node = match node {
                "*" => None,
                name if is_name(name) => Some(name.to_owned()),
                name => return Err(bad(format!("{name:?} is no name of a node"))),
            };
            if token.len() < MIN_LENGTH {
                return Err(bad(format!("a token has at least {MIN_LENGTH} characters")));
            }
            tokens.push((hash(token), node));
        }
        Ok(Self(tokens))
    }

    /// For which node a token is. Looks at all of them, whichever it is.
    pub(super) fn node_of(&self, token: &str) -> Option<Node<'_>> {
        let shown = hash(token);
        let mut found = None;
        for (known, node) in &self.0 {
            if verify_slices_are_equal(known.as_ref(), shown.as_ref()).is_ok() {
                found = found.or(Some(node.as_deref().map_or(Node::Any, Node::One)));
            }
        }
        found
    }

    /// Number of tokens.
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }
}

fn hash(token: &str) -> digest::Digest {
    digest::digest(&digest::SHA256, token.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_of_one_node_or_of_any() {
        let text = "# nodes\nnode-a aaaaaaaaaaaaaaaa # first\n\n* bbbbbbbbbbbbbbbb\n";
        let tokens = JoinTokens::parse(text).unwrap();
        assert_eq!(tokens.node_of("aaaaaaaaaaaaaaaa"), Some(Node::One("node-a")));
        assert_eq!(tokens.node_of("bbbbbbbbbbbbbbbb"), Some(Node::Any));
        for other in ["", "*", "aaaaaaaaaaaaaaa", "aaaaaaaaaaaaaaaaa", "node-a", "#", "first"] {
            assert_eq!(tokens.node_of(other), None, "{other}");
        }
    }

    #[test]
    fn a_bad_line_is_named_and_its_token_is_not() {
        for line in ["node-a", "node-a short", "a/b cccccccccccccccc", "n cccccccccccccccc more"] {
            let error = JoinTokens::parse(&format!("# x\n{line}")).unwrap_err();
            assert_eq!(error.line, 2, "{line}");
            assert!(!error.to_string().contains("cccc"), "{error}");
        }
    }
}
