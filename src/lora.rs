//! Low-rank adapters (LoRA, arXiv 2106.09685) beside the linear maps of a model, of either kind.
//!
//! A model holds up to [`MOST`] of them by name, of which at most one is active: its parts are in the maps, those of
//! the others here. So layers, the walk over parameters and training know of one at most, and activating another moves
//! a pointer for each map. While a model holds adapters, its own matrices are stored for products only.

use std::collections::BTreeMap;
use std::fmt;
use std::mem::{swap, take};

use ndarray::ArrayD;
use rand::SeedableRng;

use crate::kernels::memory::fits as fits_memory;
use crate::layers::{Dropout, LORA_NAMES, Linear, LowRank, Rng, seed_at};
use crate::parameters::{Parameter, ParameterMut, Visitor, VisitorMut, fits, join};
use crate::{Error, Result};

mod calls;
mod folder;
mod options;
mod saved;

pub(crate) use calls::lora_calls;
pub(crate) use folder::{load, save};
pub use options::LoraOptions;
pub(crate) use options::is_lora;
pub(crate) use saved::{SavedLora, parameters};

/// The name of an adapter for which none was given.
pub(crate) const DEFAULT: &str = "default";

/// The maps that an adapter covers, and its size. Its `Display` is a line of totals and one for the maps of each kind.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct LoraCoverage {
    /// The names of the maps that have one, and their shapes `[out, in]`.
    pub maps: Vec<(String, [usize; 2])>,
    /// Parameters of the adapter: the numbers in all A and B.
    pub parameters: usize,
    /// Parameters of the model without adapters.
    pub model_parameters: usize,
}

impl fmt::Display for LoraCoverage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let LoraCoverage { maps, parameters, model_parameters: of } = self;
        let share = 100.0 * *parameters as f64 / (*of).max(1) as f64;
        write!(f, "{} maps, {parameters} parameters: {share:.2} % of {of}", maps.len())?;
        let mut kinds: Vec<(String, [usize; 2], usize)> = Vec::new();
        for (name, shape) in maps {
            // blocks.3.mamba.in_proj → blocks.*.mamba.in_proj
            let mut layer = true;
            let parts = name.split('.').map(|part| match part.parse::<usize>() {
                Ok(_) if std::mem::take(&mut layer) => "*",
                _ => part,
            });
            let kind = parts.collect::<Vec<_>>().join(".");
            match kinds.iter_mut().find(|(name, of, _)| *name == kind && of == shape) {
                Some((.., count)) => *count += 1,
                None => kinds.push((kind, *shape, 1)),
            }
        }
        kinds.iter().try_for_each(|(name, shape, count)| write!(f, "\n  {count} × {name} {shape:?}"))
    }
}

/// The names of maps that may have a part, and their outputs and inputs.
pub(crate) type Maps = Vec<(String, (usize, usize))>;
/// The parts of an adapter, by the names of their maps.
pub(crate) type Parts = BTreeMap<String, Box<LowRank>>;

/// The adapters that a model holds. `C` holds values computed from the weights, and an id for them: each adapter has
/// its own.
#[derive(Clone, Default)]
pub(crate) struct Adapters<C> {
    held: BTreeMap<String, Adapter<C>>,
    active: Option<String>,
    /// Of the model without a part, while an adapter is active.
    bare: C,
}

#[derive(Clone)]
struct Adapter<C> {
    options: LoraOptions,
    /// Empty while it is active.
    parts: Parts,
    cached: C,
}

impl<C: Default> Adapters<C> {
    /// Whether there is none.
    pub(crate) fn is_empty(&self) -> bool {
        self.held.is_empty()
    }

    /// The name of the one whose parts are in the maps, and its options.
    pub(crate) fn active(&self) -> Option<(&str, &LoraOptions)> {
        let name = self.active.as_deref()?;
        Some((name, &self.held[name].options))
    }

    /// Whether a parameter of the model is trained: beside adapters, only what is in the active one.
    pub(crate) fn trains(&self, name: &str) -> bool {
        self.is_empty() || is_lora(name)
    }

    /// What the gradient of the model has: the active one without its parts, which the maps have.
    pub(crate) fn zeros_like(&self) -> Self {
        let of = |(name, options): (&str, &LoraOptions)| {
            (name.to_string(), Adapter { options: options.clone(), parts: Parts::new(), cached: C::default() })
        };
        let mut held = BTreeMap::new();
        held.extend(self.active().map(of));
        Adapters { held, active: self.active.clone(), bare: C::default() }
    }

    /// To be called where the weights of the model itself change.
    pub(crate) fn forget(&mut self) {
        self.bare = C::default();
        self.held.values_mut().for_each(|adapter| adapter.cached = C::default());
    }

    /// Bytes of those that are not active.
    pub(crate) fn num_bytes(&self) -> usize {
        let mut bytes = 0;
        self.visit_held("", &mut |_, parameter| bytes += parameter.num_bytes());
        bytes
    }

    /// Whether training drops numbers in front of the active one.
    pub(crate) fn drops(&self) -> bool {
        self.active().is_some_and(|(_, options)| options.dropout > 0.0)
    }

    /// Makes training drop nothing.
    pub(crate) fn forget_dropout(&mut self) {
        self.held.values_mut().for_each(|adapter| adapter.options.dropout = 0.0);
    }

    /// Refuses to train a model that holds adapters of which none is active.
    pub(crate) fn check_trainable(&self) -> Result<()> {
        match self.is_empty() || self.active.is_some() {
            true => Ok(()),
            false => Err(Error::State(
                "the model holds adapters, of which none is active: activate one by set_lora, or remove them by remove_lora"
                    .into(),
            )),
        }
    }

    /// The parts of those that are not active, of maps whose names begin with `prefix`.
    fn visit_held<'a>(&'a self, prefix: &str, f: &mut Visitor<'_, 'a>) {
        for (name, adapter) in &self.held {
            adapter.parts.iter().for_each(|(map, part)| part.visit(&in_model_file(name, prefix, map), f));
        }
    }

    fn visit_held_mut<'a>(&'a mut self, prefix: &str, f: &mut VisitorMut<'_, 'a>) {
        for (name, adapter) in &mut self.held {
            adapter.parts.iter_mut().for_each(|(map, part)| part.visit_mut(&in_model_file(name, prefix, map), f));
        }
    }
}

/// Where the part of a map stands in the file of a model.
fn in_model_file(adapter: &str, prefix: &str, map: &str) -> String {
    format!("lora.{adapter}.{}", join(prefix, map))
}

/// A model that holds adapters itself.
pub(crate) trait Host {
    /// Values computed from its weights, and an id for them. The default is for new weights.
    type Cached: Default;

    fn adapters(&self) -> &Adapters<Self::Cached>;
    fn adapters_mut(&mut self) -> &mut Adapters<Self::Cached>;
    fn cached_mut(&mut self) -> &mut Self::Cached;
    /// Calls `f` with every map that may have a part, and its name in files.
    fn visit_maps<'a>(&'a mut self, f: &mut dyn FnMut(String, &'a mut Linear));
    fn visit_all<'a>(&'a self, f: &mut Visitor<'_, 'a>);
    fn base_parameters(&self) -> usize;
    /// Stores matrices that could be trained for products only.
    fn freeze(&mut self);
    /// Makes them what can be trained again.
    fn thaw(&mut self);
}

/// A model that has adapters, itself or in its encoders.
pub(crate) trait Adapted {
    fn maps(&mut self) -> Maps;
    /// Holds an adapter, in place of one of this name, and activates it.
    fn hold(&mut self, name: &str, options: LoraOptions, parts: Parts);
    /// `name` is held.
    fn activate(&mut self, name: Option<&str>);
    /// Adds the active one to the weights, and removes all.
    fn merge(&mut self);
    /// Removes one, or all.
    fn remove(&mut self, name: Option<&str>);
    fn names(&self) -> Vec<&str>;
    fn active(&self) -> Option<&str>;
    /// Those of the adapter of this name.
    fn options_of(&self, name: &str) -> Option<LoraOptions>;
    /// Every parameter, with the parts of the active adapter.
    fn visit_every<'a>(&'a self, f: &mut Visitor<'_, 'a>);
    /// The parts of the others, under their names in the file of a model.
    fn visit_others<'a>(&'a self, prefix: &str, f: &mut Visitor<'_, 'a>);
    fn visit_others_mut<'a>(&'a mut self, prefix: &str, f: &mut VisitorMut<'_, 'a>);
    /// Parameters of the model without adapters.
    fn model_parameters(&self) -> usize;

    /// The parts around the encoder that are trained or fitted beside an adapter, by module and name. By default none.
    fn around(&self) -> Vec<(&'static str, String, Parameter<'_>)> {
        Vec::new()
    }

    /// The shapes that there may be around the maps.
    fn around_shapes(&self) -> Vec<(&'static str, String, Vec<usize>)> {
        Vec::new()
    }

    /// Puts some of it in place. Nothing is changed where there is an error.
    fn set_around(&mut self, _: BTreeMap<String, ArrayD<f32>>) -> Result<()> {
        Ok(())
    }
}

impl<H: Host> Adapted for H {
    fn maps(&mut self) -> Maps {
        let mut maps = Vec::new();
        self.visit_maps(&mut |name, map| maps.push((name, map.dim())));
        maps
    }

    fn hold(&mut self, name: &str, options: LoraOptions, parts: Parts) {
        if self.adapters().is_empty() {
            self.freeze();
            *self.cached_mut() = H::Cached::default();
        }
        self.activate(None);
        let adapter = Adapter { options, parts, cached: H::Cached::default() };
        self.adapters_mut().held.insert(name.into(), adapter);
        self.activate(Some(name));
    }

    fn activate(&mut self, name: Option<&str>) {
        let mut adapters = take(self.adapters_mut());
        if adapters.active.as_deref() != name {
            if let Some(adapter) = adapters.active.take().and_then(|active| adapters.held.get_mut(&active)) {
                self.visit_maps(&mut |name, map| {
                    adapter.parts.extend(map.take_low_rank().map(|part| (name, part)));
                });
                swap(self.cached_mut(), &mut adapter.cached);
                swap(self.cached_mut(), &mut adapters.bare);
            }
            if let Some((name, adapter)) = name.and_then(|name| Some((name, adapters.held.get_mut(name)?))) {
                self.visit_maps(&mut |name, map| map.set_low_rank(adapter.parts.remove(&name)));
                swap(self.cached_mut(), &mut adapters.bare);
                swap(self.cached_mut(), &mut adapter.cached);
                adapters.active = Some(name.into());
            }
        }
        *self.adapters_mut() = adapters;
    }

    fn merge(&mut self) {
        if !self.adapters().is_empty() {
            self.visit_maps(&mut |_, map| map.merge());
            *self.adapters_mut() = Adapters::default();
            self.thaw();
            *self.cached_mut() = H::Cached::default();
        }
    }

    fn remove(&mut self, name: Option<&str>) {
        if name.is_none_or(|name| self.active() == Some(name)) {
            self.activate(None);
        }
        let adapters = self.adapters_mut();
        let had = !adapters.is_empty();
        adapters.held.retain(|held, _| name.is_some_and(|name| name != held));
        if had && adapters.is_empty() {
            self.thaw();
            *self.cached_mut() = H::Cached::default();
        }
    }

    fn names(&self) -> Vec<&str> {
        self.adapters().held.keys().map(String::as_str).collect()
    }

    fn active(&self) -> Option<&str> {
        self.adapters().active.as_deref()
    }

    fn options_of(&self, name: &str) -> Option<LoraOptions> {
        self.adapters().held.get(name).map(|adapter| adapter.options.clone())
    }

    fn visit_every<'a>(&'a self, f: &mut Visitor<'_, 'a>) {
        self.visit_all(f);
    }

    fn visit_others<'a>(&'a self, prefix: &str, f: &mut Visitor<'_, 'a>) {
        self.adapters().visit_held(prefix, f);
    }

    fn visit_others_mut<'a>(&'a mut self, prefix: &str, f: &mut VisitorMut<'_, 'a>) {
        self.adapters_mut().visit_held_mut(prefix, f);
    }

    fn model_parameters(&self) -> usize {
        self.base_parameters()
    }
}

/// Adds a new adapter of the maps whose names fit: A drawn from `seed`, B zero.
pub(crate) fn add(model: &mut impl Adapted, name: &str, options: &LoraOptions, seed: u64) -> Result<LoraCoverage> {
    check_room(model, name)?;
    options.validate()?;
    if options.maps.is_empty() {
        let allowed = "give at least one pattern of the names of maps; \"*_proj*\" is usual".into();
        return Err(Error::Option { option: "maps", given: "none".into(), allowed });
    }
    let mut maps = model.maps();
    let does_fit = |pattern: &str, name: &str| fits(pattern, name) || fits(&format!("*.{pattern}"), name);
    if let Some(pattern) = options.maps.iter().find(|pattern| !maps.iter().any(|(name, _)| does_fit(pattern, name))) {
        let some: Vec<_> = maps.iter().take(7).map(|(name, _)| &name[..]).collect();
        return Err(Error::Option {
            option: "maps",
            given: pattern.clone(),
            allowed: format!("no map has such a name; there are {}, …", some.join(", ")),
        });
    }
    maps.retain(|(name, _)| options.maps.iter().any(|pattern| does_fit(pattern, name)));
    check_memory(&maps, options.rank)?;
    let mut rng = Rng::seed_from_u64(seed);
    let mut parts = zeros(&maps, options);
    // in the order of the model
    maps.iter().for_each(|(name, _)| parts.get_mut(name).into_iter().for_each(|part| part.init(&mut rng)));
    Ok(hold(model, name, options, &maps, parts))
}

/// Parts of these maps, all zero.
fn zeros(maps: &Maps, options: &LoraOptions) -> Parts {
    let part = |(name, (outputs, inputs)): &(String, (usize, usize))| {
        // each map has a mask of its own
        let key = name.bytes().fold(0u64, |key, byte| seed_at(key, byte.into()));
        let dropout = Dropout::new(options.dropout as f32, key);
        (name.clone(), Box::new(LowRank::zeros(*inputs, *outputs, options.rank, options.scale(), dropout)))
    };
    let mut parts = Parts::new();
    // one by one: to collect a map sorts it, which is much code in a small program
    parts.extend(maps.iter().map(part));
    parts
}

/// Holds an adapter of these maps, and activates it.
fn hold(model: &mut impl Adapted, name: &str, options: &LoraOptions, maps: &Maps, parts: Parts) -> LoraCoverage {
    let covered = LoraCoverage {
        maps: maps.iter().map(|(name, (outputs, inputs))| (name.clone(), [*outputs, *inputs])).collect(),
        parameters: maps.iter().map(|(_, (outputs, inputs))| options.rank * (outputs + inputs)).sum(),
        model_parameters: model.model_parameters(),
    };
    let maps = maps.iter().map(|(name, _)| name.clone()).collect();
    model.hold(name, LoraOptions { maps, ..options.clone() }, parts);
    covered
}

/// Activates the adapter of this name, or none.
pub(crate) fn set(model: &mut impl Adapted, name: Option<&str>) -> Result<()> {
    name.map_or(Ok(()), |name| check_held(model, name))?;
    model.activate(name);
    Ok(())
}

/// Removes the adapter of this name.
pub(crate) fn drop(model: &mut impl Adapted, name: &str) -> Result<()> {
    check_held(model, name)?;
    model.remove(Some(name));
    Ok(())
}

fn check_held(model: &impl Adapted, name: &str) -> Result<()> {
    let names = model.names();
    match names.contains(&name) {
        true => Ok(()),
        false => Err(Error::Option {
            option: "name",
            given: format!("{name:?}"),
            allowed: format!("the model holds no adapter of this name; it holds {names:?}"),
        }),
    }
}

/// Adapters that a model holds at most: they may come from a file.
const MOST: usize = 1024;

/// Checks that a model may hold an adapter of this name.
fn check_room(model: &impl Adapted, name: &str) -> Result<()> {
    check_name(name)?;
    let names = model.names();
    match names.len() < MOST || names.contains(&name) {
        true => Ok(()),
        false => Err(Error::Option {
            option: "name",
            given: format!("{name:?}"),
            allowed: format!("a model holds at most {MOST} adapters; remove some by drop_lora"),
        }),
    }
}

/// Names become parts of those of tensors, and maybe folders.
fn check_name(name: &str) -> Result<()> {
    const LONGEST: usize = 64;
    let usual = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    match !name.is_empty() && name.len() <= LONGEST && name.chars().all(usual) {
        true => Ok(()),
        false => Err(Error::Option {
            option: "name",
            given: format!("{name:?}"),
            allowed: "an adapter's name consists of 1 to 64 ASCII letters, digits, - and _".into(),
        }),
    }
}

/// Checks that there is room for the low-rank parts of all these maps.
fn check_memory(maps: &Maps, rank: usize) -> Result<()> {
    let rows =
        maps.iter().fold(0usize, |sum, (_, (outputs, inputs))| sum.saturating_add(*outputs).saturating_add(*inputs));
    match fits_memory(rows.saturating_mul(rank).saturating_mul(size_of::<f32>())) {
        true => Ok(()),
        false => Err(Error::Option {
            option: "rank",
            given: rank.to_string(),
            allowed: "the low-rank parts do not fit into memory; make it smaller".into(),
        }),
    }
}
