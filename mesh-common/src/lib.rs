//! What crosses a boundary of the mesh.
//!
//! * `abi`: the keys and values of the kernel maps, and the decisions on them, shared by kernel programs and agent.
//! * `api`: the protobuf messages shared by agent, control plane and `meshctl`.
//! * `policy`: what policies mean, read from those messages.
//! * `serving`: which backends of a service a node leads its clients to.
#![cfg_attr(not(any(feature = "api", feature = "user", test)), no_std)]

#[cfg(feature = "abi")]
pub mod abi;
#[cfg(feature = "api")]
pub mod api;
#[cfg(feature = "api")]
pub mod policy;
#[cfg(feature = "api")]
pub mod serving;
