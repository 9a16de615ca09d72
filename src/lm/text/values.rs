//! Lists and dicts of a stranger's template.
//!
//! minijinja bounds by its fuel the instructions that run and the bytes of text they make, not what lists become: `[a, a]`
//! doubles for the price of one instruction, `a + a` and `a[1:]` are evaluated lazily, and a list in a list in a list
//! overflows the stack when it is dropped. So whatever an expression gives is made a [`Container`] at once: with its
//! items in it, nested to a limited depth, and charging every walk through it to a budget.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use minijinja::value::{DynObject, Enumerator, Object, ObjectRepr};
use minijinja::{Error, ErrorKind, State, Value};

/// How deep lists and dicts may be nested; as deep as serde_json reads them.
const MAX_DEPTH: usize = 128;
/// What walks through all lists and dicts may cost during one rendering: 8 for an item, and 1 for 64 bytes of text that are
/// compared, or for each that is written out.
const BUDGET: u64 = 1 << 26;
const ITEM: u64 = 8;
/// Items that are put into a list for the price of an instruction.
const ITEMS_PER_FUEL: usize = 4;

/// What is left for walks.
#[derive(Debug)]
pub(super) struct Budget(AtomicU64);

impl Object for Budget {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }
}

impl Budget {
    /// The variable that holds it, which a template cannot name.
    pub(super) const NAME: &str = "(budget)";

    pub(super) fn new() -> Self {
        Budget(AtomicU64::new(BUDGET))
    }

    /// Once too much was asked for there is nothing left.
    fn take(&self, cost: u64) -> bool {
        let take = |left: u64| Some(left.saturating_sub(cost));
        let before = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take);
        before.is_ok_and(|before| before > cost)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.load(Ordering::Relaxed) == 0
    }
}

/// A list or dict whose lists and dicts are containers, too.
struct Container {
    /// minijinja's own.
    inner: DynObject,
    length: usize,
    depth: usize,
    /// Of the texts that are its items.
    bytes: u64,
    budget: Arc<Budget>,
}

impl Object for Container {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        self.inner.repr()
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        self.inner.get_value(key)
    }

    fn get_value_by_str(self: &Arc<Self>, key: &str) -> Option<Value> {
        self.inner.get_value_by_str(key)
    }

    /// Every way through it begins here: comparing, hashing, iterating, writing out. Empty when nothing is left to pay with; the
    /// rendering then ends with an error.
    fn enumerate(self: &Arc<Self>) -> Enumerator {
        let cost = ITEM.saturating_mul(1 + self.length as u64).saturating_add(self.bytes / 64);
        if self.budget.take(cost) { self.inner.enumerate() } else { Enumerator::Empty }
    }

    fn enumerator_len(self: &Arc<Self>) -> Option<usize> {
        Some(self.length)
    }

    fn render(self: &Arc<Self>, f: &mut fmt::Formatter) -> fmt::Result {
        fmt::Debug::fmt(&**self, f)
    }
}

impl fmt::Debug for Container {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let cost = ITEM.saturating_mul(1 + self.length as u64).saturating_add(self.bytes);
        if self.budget.take(cost) { fmt::Display::fmt(&self.inner, f) } else { Ok(()) }
    }
}

/// The function that is put around every expression that can give a list or dict.
pub(super) fn bounded(state: &State, value: Value) -> Result<Value, Error> {
    if value.as_object().is_none_or(is_opaque) { Ok(value) } else { kept(state, value) }
}

/// As [`bounded`], for what is kept beyond the block it is made in: nothing that can hold what it is put into.
pub(super) fn kept(state: &State, value: Value) -> Result<Value, Error> {
    if value.as_object().is_none() {
        return Ok(value);
    }
    match state.lookup(Budget::NAME).and_then(|budget| budget.downcast_object()) {
        Some(budget) => contained(&value, 0, &budget, &|| state.consume_fuel(1)).map(|(value, _)| value),
        None => Err(invalid("a template outside a rendering".into())),
    }
}

/// What a template is given.
pub(super) fn given(value: Value, budget: &Arc<Budget>) -> Result<Value, Error> {
    contained(&value, 0, budget, &|| Ok(())).map(|(value, _)| value)
}

/// Namespaces, macros, loops: what has no items, or items that change.
fn is_opaque(object: &DynObject) -> bool {
    object.repr() == ObjectRepr::Plain || object.type_name().starts_with("minijinja::vm::") || is_namespace(object)
}

fn is_namespace(object: &DynObject) -> bool {
    object.type_name().contains("namespace")
}

/// The value with its lists and dicts in containers, and how deep they are nested. `pay` is called for every few items.
fn contained(
    value: &Value,
    above: usize,
    budget: &Arc<Budget>,
    pay: &dyn Fn() -> Result<(), Error>,
) -> Result<(Value, usize), Error> {
    let Some(object) = value.as_object() else { return Ok((value.clone(), 0)) };
    if is_opaque(object) {
        let kind = if is_namespace(object) { "namespace".to_owned() } else { value.kind().to_string() };
        return Err(invalid(format!("lists, dicts and namespaces hold texts, numbers, lists and dicts, not a {kind}")));
    }
    let finished = value.downcast_object_ref::<Container>();
    if above + finished.map_or(1, |container| container.depth) > MAX_DEPTH {
        return Err(invalid(format!("lists and dicts are nested more than {MAX_DEPTH} deep")));
    }
    if let Some(container) = finished {
        return Ok((value.clone(), container.depth));
    }
    let (mut depth, mut bytes, mut length) = (0, 0, 0);
    let mut add = |item: &Value| {
        length += 1;
        if length % ITEMS_PER_FUEL == 1 {
            pay()?;
        }
        let (item, below) = contained(item, above + 1, budget, pay)?;
        depth = depth.max(below);
        bytes += item.as_str().map_or(0, str::len) as u64;
        Ok::<_, Error>(item)
    };
    let inner = if object.repr() == ObjectRepr::Map {
        let pairs = object.try_iter_pairs().into_iter().flatten();
        let pairs = pairs.map(|(key, value)| Ok((add(&key)?, add(&value)?))).collect::<Result<Vec<_>, Error>>()?;
        Value::from_pairs(pairs)
    } else {
        let items = object.try_iter().into_iter().flatten();
        Value::from(items.map(|item| add(&item)).collect::<Result<Vec<_>, Error>>()?)
    };
    let Some(inner) = inner.as_object().cloned() else { return Ok((inner, 0)) };
    let length = inner.enumerator_len().unwrap_or(length);
    let container = Container { inner, length, depth: depth + 1, bytes, budget: Arc::clone(budget) };
    Ok((Value::from_object(container), depth + 1))
}

fn invalid(message: String) -> Error {
    Error::new(ErrorKind::InvalidOperation, message)
}
