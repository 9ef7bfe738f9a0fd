//! Dates of the proleptic Gregorian calendar.

/// A date and a time of day. Fields may be out of range, as guests write them; [`Self::to_unix`] carries them over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct DateTime {
    pub(crate) year: i64,
    /// 1 to 12.
    pub(crate) month: u8,
    /// 1 to 31.
    pub(crate) day: u8,
    pub(crate) hour: u8,
    pub(crate) minute: u8,
    pub(crate) second: u8,
}

const DAY: i64 = 86_400;
/// Days from the first of March of year 0 to 1970-01-01.
const EPOCH: i64 = 719_468;
/// Days of the 400 years after which the calendar repeats.
const ERA: i64 = 146_097;

/// Days since 1970-01-01 of a date. Years are counted from March, so that the leap day is a year's last.
fn days_from(year: i64, month: i64, day: i64) -> i64 {
    let (year, month) = if month > 2 {
        (year, month - 3)
    } else {
        (year - 1, month + 9)
    };
    let leap_days = year.div_euclid(4) - year.div_euclid(100) + year.div_euclid(400);
    // The days before a month, counted from March: 31, 30, 31, 30, 31 repeat.
    let before = (153 * month + 2) / 5;
    365 * year + leap_days + before + day - 1 - EPOCH
}

impl DateTime {
    /// From seconds since 1970-01-01.
    pub(crate) fn from_unix(seconds: i64) -> Self {
        let days = seconds.div_euclid(DAY);
        let of_day = seconds.rem_euclid(DAY);
        // An estimate from the mean length of a year is at most one too high.
        let mut year = 1970 + (days * 400).div_euclid(ERA) + 1;
        while days_from(year, 1, 1) > days {
            year -= 1;
        }
        let mut month = 12;
        while days_from(year, month, 1) > days {
            month -= 1;
        }
        Self {
            year,
            month: month as u8,
            day: (days - days_from(year, month, 1) + 1) as u8,
            hour: (of_day / 3600) as u8,
            minute: (of_day / 60 % 60) as u8,
            second: (of_day % 60) as u8,
        }
    }

    /// To seconds since 1970-01-01.
    pub(crate) fn to_unix(self) -> i64 {
        let month = i64::from(self.month.clamp(1, 12));
        let days = days_from(self.year, month, i64::from(self.day.max(1)));
        let time = i64::from(self.hour) * 3600 + i64::from(self.minute) * 60;
        days * DAY + time + i64::from(self.second)
    }

    /// 1 for Sunday to 7.
    pub(crate) fn day_of_week(self) -> u8 {
        let days = self.to_unix().div_euclid(DAY);
        // The epoch was a Thursday.
        (days + 4).rem_euclid(7) as u8 + 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn known_dates() {
        let time = DateTime::from_unix(1_709_249_696);
        assert_eq!((time.year, time.month, time.day), (2024, 2, 29));
        assert_eq!((time.hour, time.minute, time.second), (23, 34, 56));
        assert_eq!(time.day_of_week(), 5);
        assert_eq!(DateTime::from_unix(-1).year, 1969);
        assert_eq!(DateTime::from_unix(0).day_of_week(), 5);
    }

    proptest! {
        #[test]
        fn there_and_back(seconds in -60_000_000_000i64..300_000_000_000) {
            let time = DateTime::from_unix(seconds);
            prop_assert_eq!(time.to_unix(), seconds);
            prop_assert!((1..=12).contains(&time.month) && (1..=31).contains(&time.day));
            prop_assert!(time.hour < 24 && time.minute < 60 && time.second < 60);
        }
    }
}
