//! What chat templates use of Python: methods of texts, and JSON as `json.dumps` writes it.

use std::io::{self, Write};

use minijinja::value::Kwargs;
use minijinja::{Error, ErrorKind, State, Value};
use serde::Serialize;
use serde_json::ser::{CharEscape, Formatter, PrettyFormatter, Serializer};

use super::values;

/// Longest prompt in bytes.
pub(super) const MAX_PROMPT: usize = 16 << 20;

/// Methods of texts, lists and dicts.
pub(super) fn method(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    let plain = |args: &[Value]| args.is_empty() || (args.len() == 1 && args[0].is_none());
    match (value.as_str(), name) {
        (Some(text), "strip") if plain(args) => Ok(Value::from(text.trim_matches(is_space))),
        (Some(text), "lstrip") if plain(args) => Ok(Value::from(text.trim_start_matches(is_space))),
        (Some(text), "rstrip") if plain(args) => Ok(Value::from(text.trim_end_matches(is_space))),
        (Some(separator), "join") if args.len() == 1 => join_texts(state, separator, &args[0]),
        // it takes a width from the text and pads to it before the fuel is asked
        (Some(_), "format") => Err(Error::from(ErrorKind::UnknownMethod)),
        _ => minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args),
    }
}

/// `str.isspace`, which has four control characters more than Unicode's white space.
fn is_space(character: char) -> bool {
    character.is_whitespace() || ('\x1c'..='\x1f').contains(&character)
}

/// The filter of the same name, which is `str.strip`.
pub(super) fn trim(text: &str, characters: Option<&str>) -> String {
    match characters {
        Some(characters) => text.trim_matches(|character| characters.contains(character)).to_owned(),
        None => text.trim_matches(is_space).to_owned(),
    }
}

fn join_texts(state: &State, separator: &str, items: &Value) -> Result<Value, Error> {
    join_items(state, separator, items, |item| match item.as_str() {
        Some(_) => Ok(item),
        None => Err(Error::new(ErrorKind::InvalidOperation, format!("join takes texts, not {}", item.kind()))),
    })
}

/// The filter of the same name.
pub(super) fn join(
    state: &State,
    items: &Value,
    separator: Option<&str>,
    attribute: Option<&str>,
    options: Kwargs,
) -> Result<Value, Error> {
    let separator = separator.or(options.get("d")?).unwrap_or("");
    let attribute = attribute.or(options.get("attribute")?);
    options.assert_all_used()?;
    join_items(state, separator, items, |item| match attribute {
        Some(path) => path.split('.').try_fold(item, |item, name| item.get_attr(name)),
        None => Ok(item),
    })
}

fn join_items(
    state: &State,
    separator: &str,
    items: &Value,
    item_of: impl Fn(Value) -> Result<Value, Error>,
) -> Result<Value, Error> {
    let mut joined = String::new();
    for (index, item) in items.try_iter()?.enumerate() {
        let item = item_of(item)?;
        let written;
        let text = match item.as_str() {
            Some(text) => text,
            None => {
                written = item.to_string();
                &written
            }
        };
        // before the text grows
        state.consume_fuel(1 + (separator.len() + text.len()) as u64 / 64)?;
        if index > 0 {
            joined.push_str(separator);
        }
        joined.push_str(text);
    }
    Ok(Value::from(joined))
}

pub(super) fn raise_exception(message: &str) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, format!("the template says: {message}")))
}

/// minijinja's own, for values that cannot hold the namespace itself.
pub(super) fn namespace(state: &mut State, build: &Value, given: Kwargs) -> Result<Value, Error> {
    let values = given.args().map(|name| Ok((name, values::kept(state, given.peek(name)?)?)));
    let values = values.collect::<Result<Kwargs, Error>>()?;
    build.call(state, &[Value::from(values)])
}

/// The filter `tojson` as transformers has it: `json.dumps` without escapes for HTML.
pub(super) fn tojson(state: &State, value: Value, options: Kwargs) -> Result<Value, Error> {
    let ascii = options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false);
    let indent = options.get::<Option<usize>>("indent")?;
    let sort_keys = options.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    let separators = options.get::<Option<Vec<String>>>("separators")?;
    options.assert_all_used()?;
    if indent.is_some_and(|indent| indent > 16) {
        return Err(Error::new(ErrorKind::InvalidOperation, "tojson takes an indent of at most 16"));
    }
    let (item, key) = match separators.as_deref() {
        None if indent.is_some() => (",", ": "),
        None => (", ", ": "),
        Some([item, key]) if item.len() <= 16 && key.len() <= 16 => (item.as_str(), key.as_str()),
        Some(_) => return Err(Error::new(ErrorKind::InvalidOperation, "tojson takes two short separators")),
    };
    let spaces = " ".repeat(indent.unwrap_or(0));
    let pretty = indent.map(|_| PrettyFormatter::with_indent(spaces.as_bytes()));
    let mut json = Bounded(Vec::new());
    let mut serializer = Serializer::with_formatter(&mut json, Dumps { ascii, item, key, pretty });
    let written = if sort_keys {
        // first as it is, for its length
        serde_json::to_writer(Bounded(Vec::new()), &value).map_err(bad_json)?;
        let mut value = serde_json::to_value(&value).map_err(bad_json)?;
        value.sort_all_objects();
        value.serialize(&mut serializer)
    } else {
        value.serialize(&mut serializer)
    };
    written.map_err(bad_json)?;
    state.consume_fuel(json.0.len() as u64 / 4)?;
    Ok(Value::from_safe_string(String::from_utf8(json.0).map_err(bad_json)?))
}

fn bad_json(error: impl std::error::Error) -> Error {
    Error::new(ErrorKind::BadSerialization, error.to_string())
}

/// JSON that ends with an error where it grows longer than a prompt.
struct Bounded(Vec<u8>);

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > MAX_PROMPT {
            return Err(io::Error::other(format!("the JSON is longer than {MAX_PROMPT} bytes")));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Writes as Python's `json.dumps` does.
struct Dumps<'a> {
    ascii: bool,
    item: &'a str,
    key: &'a str,
    /// For line breaks and indents.
    pretty: Option<PrettyFormatter<'a>>,
}

impl Dumps<'_> {
    fn begin_item<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if !first {
            writer.write_all(self.item.as_bytes())?;
        }
        // told that it is the first, it writes the line break and the indent only
        self.pretty.as_mut().map_or(Ok(()), |pretty| pretty.begin_array_value(writer, true))
    }
}

macro_rules! pretty {
    ($($method:ident $(, $default:literal)?);*) => {
        $(fn $method<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
            match &mut self.pretty {
                Some(pretty) => pretty.$method(writer),
                None => writer.write_all(concat!($($default)?).as_bytes()),
            }
        })*
    };
}

impl Formatter for Dumps<'_> {
    pretty!(begin_array, "["; end_array, "]"; end_array_value; begin_object, "{"; end_object, "}"; end_object_value);

    fn begin_array_value<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        self.begin_item(writer, first)
    }

    fn begin_object_key<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        self.begin_item(writer, first)
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(self.key.as_bytes())
    }

    fn write_f64<W: ?Sized + io::Write>(&mut self, writer: &mut W, value: f64) -> io::Result<()> {
        writer.write_all(repr(value).as_bytes())
    }

    fn write_string_fragment<W: ?Sized + io::Write>(&mut self, writer: &mut W, text: &str) -> io::Result<()> {
        if !self.ascii {
            return writer.write_all(text.as_bytes());
        }
        for character in text.chars() {
            // noncharacters are marks that are taken out later
            if character.is_ascii() || ('\u{fdd0}'..='\u{fdef}').contains(&character) {
                write!(writer, "{character}")?;
            } else {
                for unit in character.encode_utf16(&mut [0; 2]) {
                    write!(writer, "\\u{unit:04x}")?;
                }
            }
        }
        Ok(())
    }

    fn write_char_escape<W: ?Sized + io::Write>(&mut self, writer: &mut W, escape: CharEscape) -> io::Result<()> {
        serde_json::ser::CompactFormatter.write_char_escape(writer, escape)
    }
}

/// A number as Python's `repr` has it: with an exponent below 1e-4 and from 1e16.
fn repr(value: f64) -> String {
    let scientific = format!("{value:e}");
    let Some((digits, exponent)) = scientific.split_once('e') else { return scientific };
    match exponent.parse::<i32>() {
        Ok(exponent) if !(-4..16).contains(&exponent) => {
            let sign = if exponent < 0 { '-' } else { '+' };
            format!("{digits}e{sign}{:02}", exponent.abs())
        }
        _ => format!("{value:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_pythons() {
        for (number, expected) in [
            (0.0, "0.0"),
            (-2.5, "-2.5"),
            (0.1, "0.1"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.5e300, "1.5e+300"),
            (0.0001, "0.0001"),
            (0.00001, "1e-05"),
            (-1.25e-7, "-1.25e-07"),
            (123456.789, "123456.789"),
        ] {
            assert_eq!(repr(number), expected);
        }
    }
}
