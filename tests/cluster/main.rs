//! Whole clusters in this process: what they promise, and what the embedded model knows.

mod builtin;
mod exam;
mod harness;
mod mixed;
mod prefix;
mod sampling;
mod serving;
mod shapes;
mod speculation;
