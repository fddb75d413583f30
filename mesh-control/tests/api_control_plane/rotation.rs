//! Changing certificates while agents come and go.
