//! What configs call the choices.

use super::{KeyQueryNorm, MlpActivation, RopeType, TorchDtype};

pub(super) const NORMS: [(&str, KeyQueryNorm); 3] =
    [("none", KeyQueryNorm::None), ("rms", KeyQueryNorm::Rms), ("perhead-rms", KeyQueryNorm::PerHeadRms)];
pub(super) const ACTIVATIONS: [(&str, MlpActivation); 2] =
    [("silu", MlpActivation::Silu), ("relu2", MlpActivation::Relu2)];
pub(super) const ROPES: [(&str, RopeType); 2] = [("default", RopeType::Default), ("ntk", RopeType::Ntk)];
pub(super) const DTYPES: [(&str, TorchDtype); 3] =
    [("float32", TorchDtype::F32), ("float16", TorchDtype::F16), ("bfloat16", TorchDtype::BF16)];
