//! The times of frames: evenly spaced ones are left out, others can become a channel. Values with timestamps, `(time,value)`.

use super::{TimeInput, short, value};

/// How far a time may lie from where even spacing would have it, as a share of the spacing: times are often rounded.
const ROUNDED: f64 = 0.01;

const DISORDER: &str = "the timestamps do not ascend: put the values in the order of time, each time once";

/// The times of a series.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Times {
    /// As numbers; dates in seconds.
    times: Vec<f64>,
    are_dates: bool,
}

impl Times {
    /// Adds the time of one more frame.
    pub fn push(&mut self, text: &str) -> Result<(), String> {
        let (time, is_date) = read_time(text)?;
        if !self.times.is_empty() && is_date != self.are_dates {
            return Err("some times of the series are dates and some are numbers".into());
        }
        self.are_dates = is_date;
        self.times.push(time);
        Ok(())
    }

    /// Sorts them. Returns where each of them stood.
    #[cfg(feature = "csv")]
    pub fn sort(&mut self) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.times.len()).collect();
        order.sort_by(|&a, &b| self.times[a].total_cmp(&self.times[b]));
        self.times = order.iter().map(|&i| self.times[i]).collect();
        order
    }

    /// The channel that they become.
    pub fn channel(&self, time: TimeInput) -> Result<Vec<f32>, String> {
        let form = |delta: f64| match time {
            TimeInput::LogDelta => delta.ln() as f32,
            TimeInput::Even | TimeInput::Delta => delta as f32,
        };
        let steps = || self.times.windows(2).map(|pair| pair[1] - pair[0]);
        let all: Vec<f32> = std::iter::once(steps().next().unwrap_or(1.0)).chain(steps()).map(form).collect();
        // written so that a number that is none fails
        if !steps().all(|step| step > 0.0) {
            return Err(DISORDER.into());
        }
        match all.iter().any(|delta| !delta.is_finite()) {
            true => Err("the timestamps are so far apart that 32-bit numbers do not hold the differences".into()),
            false => Ok(all),
        }
    }

    /// The time from one value to the next, `None` for a single one.
    pub fn spacing(&self) -> Result<Option<Spacing>, String> {
        let [first, .., last] = self.times[..] else { return Ok(None) };
        let spacing = |each: f64| Spacing { each, are_dates: self.are_dates };
        let each = (last - first) / (self.times.len() - 1) as f64;
        let steps = || self.times.windows(2).map(|pair| pair[1] - pair[0]);
        let (least, most) = (steps().fold(f64::INFINITY, f64::min), steps().fold(f64::NEG_INFINITY, f64::max));
        // false for a number that is none, too
        if !(least > 0.0 && each.is_finite()) {
            return Err(DISORDER.into());
        }
        let due = |i: usize| first + i as f64 * each;
        if self.times.iter().enumerate().any(|(i, time)| (time - due(i)).abs() > ROUNDED * each) {
            return Err(format!(
                "the timestamps are uneven, {} to {} apart: a frame has no time of its own, so only evenly spaced \
                 values are read; resample them, put `?` where values are missing, or make the times an input \
                 (TimeInput)",
                spacing(least).amount(),
                spacing(most).amount()
            ));
        }
        Ok(Some(spacing(each)))
    }
}

/// The time from one value to the next.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Spacing {
    each: f64,
    are_dates: bool,
}

impl Spacing {
    /// Whether both are equal but for rounding.
    pub fn is_like(self, other: Spacing) -> bool {
        self.are_dates == other.are_dates && (self.each - other.each).abs() <= ROUNDED * self.each.max(other.each)
    }

    /// In seconds where the times are dates, and otherwise in the unit of the file.
    pub fn amount(self) -> String {
        // what is left over is the rounding of f64
        let each = (self.each * 1e6).round() / 1e6;
        let each = if each == 0.0 { self.each } else { each };
        if self.are_dates { format!("{each} s") } else { each.to_string() }
    }
}

/// The spacing of all series, which must be the same since it is dropped: of the series before, and of one more.
pub(super) fn common(before: Option<Spacing>, new: Option<Spacing>) -> Result<Option<Spacing>, String> {
    match (before, new) {
        (Some(before), Some(new)) if !before.is_like(new) => Err(format!(
            "its timestamps are {} apart, those of the series before {}; give all series one spacing",
            new.amount(),
            before.amount()
        )),
        (before, new) => Ok(before.or(new)),
    }
}

/// Says how timestamps were used.
pub(super) fn note(time: TimeInput, spacing: Option<Spacing>) -> String {
    match time.channel() {
        Some(name) => format!("the timestamps become the channel `{name}`"),
        None => {
            let apart = spacing.map_or("one per series".into(), |spacing| format!("evenly {} apart", spacing.amount()));
            format!("the timestamps ({apart}) are dropped")
        }
    }
}

/// Reads `(time,value),(time,value)`.
pub(super) fn read(field: &str) -> Result<(Vec<f32>, Times), String> {
    let mut values = Vec::new();
    let mut times = Times::default();
    let mut rest = field;
    loop {
        let place = values.len() + 1;
        let fault = |reason: String| format!("value {place}: {reason}");
        let pair = rest.trim_ascii_start().strip_prefix('(').and_then(|rest| rest.split_once(')'));
        let Some((pair, after)) = pair else {
            return Err(fault(format!("`{}` is not a `(time,value)`, as `@timestamps true` announces", short(rest))));
        };
        let (time, text) = pair.rsplit_once(',').ok_or_else(|| fault(format!("`({})` has no `,`", short(pair))))?;
        times.push(time.trim_ascii()).map_err(fault)?;
        values.push(value(text.trim_ascii()).map_err(fault)?);
        match after.trim_ascii_start().strip_prefix(',') {
            Some(next) => rest = next,
            None if after.trim_ascii().is_empty() => return Ok((values, times)),
            None => return Err(fault(format!("expected `,` after it, found `{}`", short(after)))),
        }
    }
}

/// A time, and whether it is a date.
fn read_time(text: &str) -> Result<(f64, bool), String> {
    let number = text.parse().ok().filter(|number: &f64| number.is_finite()).map(|number| (number, false));
    number.or_else(|| date(text).map(|seconds| (seconds, true))).ok_or_else(|| {
        format!("`{}` is not a timestamp: a number, or a date such as 2004-08-10 or 2004-08-10 14:30:00", short(text))
    })
}

/// Seconds since 1970-01-01 00:00:00.
fn date(text: &str) -> Option<f64> {
    let (day, time) = text.split_once([' ', 'T']).unwrap_or((text, "0:0"));
    let mut parts = day.split(['-', '/']).map(|part| part.parse::<i32>().ok());
    let [year, month, day] = [parts.next()??, parts.next()??, parts.next()??];
    let mut clock = time.trim_ascii().trim_end_matches('Z').split(':').map(|part| part.parse::<f64>().ok());
    let [hours, minutes] = [clock.next()??, clock.next()??];
    let seconds = clock.next().unwrap_or(Some(0.0))?;
    let is_date = (0..=9999).contains(&year) && (1..=12).contains(&month) && (1..=31).contains(&day);
    let is_time = (0.0..=24.0).contains(&hours) && (0.0..60.0).contains(&minutes) && (0.0..=60.0).contains(&seconds);
    if !is_date || !is_time || parts.next().is_some() || clock.next().is_some() {
        return None;
    }
    Some(f64::from(days(year, month, day)) * 86400.0 + hours * 3600.0 + minutes * 60.0 + seconds)
}

/// Days since 1970-01-01. Years are counted from March, so that a leap day is the last of its year.
fn days(year: i32, month: i32, day: i32) -> i32 {
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let leap_days = year.div_euclid(4) - year.div_euclid(100) + year.div_euclid(400);
    // the months from March on have 31, 30, 31, 30, 31 days, again and again
    year * 365 + leap_days + (153 * month + 2) / 5 + day - 1 - 719_468
}
