//! `strftime_now`: the day of a rendering, which some templates write into the prompt.

use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::{Error, ErrorKind, State, Value};

/// The variable that holds the seconds since 1970, which a template cannot name.
pub(super) const NOW: &str = "(now)";

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

/// Seconds since 1970, or none where the platform has no clock.
pub(super) fn seconds(now: Option<SystemTime>) -> Value {
    // there, asking for the time is a panic
    let no_clock = cfg!(all(target_family = "wasm", target_os = "unknown"));
    let now = if no_clock { now } else { now.or_else(|| Some(SystemTime::now())) };
    match now.map(|now| (now, now.duration_since(UNIX_EPOCH))) {
        None => Value::from(()),
        Some((_, Ok(after))) => Value::from(i64::try_from(after.as_secs()).unwrap_or(i64::MAX)),
        Some((_, Err(before))) => {
            let before = before.duration();
            let whole = i64::try_from(before.as_secs()).unwrap_or(i64::MAX);
            Value::from(-whole - i64::from(before.subsec_nanos() > 0))
        }
    }
}

/// The function of templates.
pub(super) fn strftime_now(state: &State, format: &str) -> Result<String, Error> {
    let invalid = |message: String| Error::new(ErrorKind::InvalidOperation, message);
    let Some(seconds) = state.lookup(NOW).and_then(|now| now.as_i64()) else {
        return Err(invalid(
            "strftime_now needs a clock, which this platform does not have: set ChatOptions::now".into(),
        ));
    };
    state.consume_fuel(1 + format.len() as u64 / 8)?;
    strftime(seconds, format).map_err(invalid)
}

/// As Python's `strftime` in the C locale, in UTC.
fn strftime(seconds: i64, format: &str) -> Result<String, String> {
    let days = seconds.div_euclid(86_400);
    let second = seconds.rem_euclid(86_400);
    let (year, month, day) = civil(days);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    let weekday = (days + 4).rem_euclid(7) as usize;
    let day_of_year = days - days_from_civil(year, 1, 1) + 1;
    let month_name = MONTHS[month as usize - 1];

    let mut text = String::new();
    let mut characters = format.chars();
    while let Some(character) = characters.next() {
        if character != '%' {
            text.push(character);
            continue;
        }
        let mut directive = characters.next();
        // glibc's: without the zero in front
        let plain = directive == Some('-');
        if plain {
            directive = characters.next();
        }
        let number = |value: i64, width: usize| {
            if plain { value.to_string() } else { format!("{value:0width$}") }
        };
        let nested = |format: &str| strftime(seconds, format);
        text.push_str(&match directive {
            Some('Y') => year.to_string(),
            Some('y') => number(year.rem_euclid(100), 2),
            Some('m') => number(month, 2),
            Some('d') => number(day, 2),
            Some('e') => format!("{day:2}"),
            Some('B') => month_name.into(),
            Some('b' | 'h') => month_name[..3].into(),
            Some('A') => DAYS[weekday].into(),
            Some('a') => DAYS[weekday][..3].into(),
            Some('w') => weekday.to_string(),
            Some('u') => if weekday == 0 { 7 } else { weekday }.to_string(),
            Some('j') => number(day_of_year, 3),
            Some('H') => number(hour, 2),
            Some('I') => number((hour + 11) % 12 + 1, 2),
            Some('p') => if hour < 12 { "AM" } else { "PM" }.into(),
            Some('M') => number(minute, 2),
            Some('S') => number(second, 2),
            Some('f') => "000000".into(),
            Some('s') => seconds.to_string(),
            Some('z') => "+0000".into(),
            Some('Z') => "UTC".into(),
            Some('F') => nested("%Y-%m-%d")?,
            Some('T' | 'X') => nested("%H:%M:%S")?,
            Some('R') => nested("%H:%M")?,
            Some('D' | 'x') => nested("%m/%d/%y")?,
            Some('c') => nested("%a %b %e %H:%M:%S %Y")?,
            Some('n') => "\n".into(),
            Some('t') => "\t".into(),
            Some('%') => "%".into(),
            Some(other) => return Err(format!("strftime_now does not know %{other}")),
            None => return Err("the format of strftime_now ends in %".into()),
        });
    }
    Ok(text)
}

/// Year, month and day of a number of days since 1970, in the Gregorian calendar (Howard Hinnant's `civil_from_days`).
fn civil(days: i64) -> (i64, i64, i64) {
    let days = days + 719_468;
    let era = days.div_euclid(146_097);
    let day_of_era = days.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    // years that begin in March
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    (year_of_era + era * 400 + i64::from(month <= 2), month, day)
}

fn days_from_civil(year: i64, month: i64, day: i64) -> i64 {
    let year = year - i64::from(month <= 2);
    let era = year.div_euclid(400);
    let year_of_era = year.rem_euclid(400);
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    era * 146_097 + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year - 719_468
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_pythons() {
        for (seconds, expected) in [
            (0, "1970-01-01 00:00:00 Thu 4 001 12 AM 70"),
            (951_782_400, "2000-02-29 00:00:00 Tue 2 060 12 AM 00"),
            (1_767_225_599, "2025-12-31 23:59:59 Wed 3 365 11 PM 25"),
            (-1, "1969-12-31 23:59:59 Wed 3 365 11 PM 69"),
            (4_107_542_400, "2100-03-01 00:00:00 Mon 1 060 12 AM 00"),
        ] {
            assert_eq!(strftime(seconds, "%Y-%m-%d %H:%M:%S %a %w %j %I %p %y").unwrap(), expected);
        }
        assert_eq!(strftime(1_722_297_600, "%d %b %Y, %B %-d, %A%%").unwrap(), "30 Jul 2024, July 30, Tuesday%");
        assert_eq!(strftime(1_722_297_600, "%F %T %c").unwrap(), "2024-07-30 00:00:00 Tue Jul 30 00:00:00 2024");
        assert!(strftime(0, "%Q").is_err() && strftime(0, "a%").is_err());
        for days in (-800_000..800_000).step_by(97) {
            let (year, month, day) = civil(days);
            assert_eq!(days_from_civil(year, month, day), days);
        }
    }
}
