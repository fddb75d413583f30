//! Which cgroup is which workload.
//!
//! `watch` sees cgroups come and go, `path` reads their names, `enroll` joins them with what the control plane announced.

pub mod enroll;
pub mod path;
pub mod watch;

pub use enroll::{Change, Enrolled, Enrollment};
pub use path::CgroupKind;
pub use watch::CgroupEvent;
