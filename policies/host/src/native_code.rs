//! Takes compiled code into the engine: the only place that trusts bytes to be machine code.
#![expect(unsafe_code, reason = "wasmtime runs compiled components as they are")]

use wasmtime::Engine;
use wasmtime::component::Component;

use crate::store::Sealed;

/// The component in `sealed`.
pub(crate) fn load(engine: &Engine, sealed: &Sealed) -> wasmtime::Result<Component> {
    // SAFETY: a `Sealed` exists only for what a compiler process of this host wrote, or for bytes that carry its MAC,
    // made with a key that only this installation has. They are in memory, where nobody changes them.
    unsafe { Component::deserialize(engine, sealed.code()) }
}
