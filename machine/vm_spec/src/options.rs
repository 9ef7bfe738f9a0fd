//! Option values of the form `FIRST,key=value,key=value`, with `,,` for a comma, as QEMU's users write them.

/// What is wrong with an option's value. The message names the option and says what was expected.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{option}: {message}")]
pub struct OptionError {
    /// The option, such as `--disk`.
    pub option: String,
    /// What is wrong, and what was expected.
    pub message: String,
}

impl OptionError {
    /// An error of the option.
    pub fn new(option: &str, message: impl Into<String>) -> Self {
        Self {
            option: option.to_owned(),
            message: message.into(),
        }
    }
}

/// A split option value, whose parts are taken one by one; what is left at the end was not known.
#[derive(Debug)]
pub struct Options {
    option: String,
    parts: Vec<(String, Option<String>)>,
}

/// Splits at commas; two commas stand for one.
fn split(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        let last = parts.last_mut().expect("never empty");
        match c {
            ',' if chars.peek() == Some(&',') => {
                chars.next();
                last.push(',');
            }
            ',' => parts.push(String::new()),
            c => last.push(c),
        }
    }
    parts
}

impl Options {
    /// Splits the value of `option`.
    pub fn parse(option: &str, text: &str) -> Self {
        let parts = split(text)
            .into_iter()
            .filter(|part| !part.is_empty())
            .map(|part| match part.split_once('=') {
                Some((key, value)) => (key.to_owned(), Some(value.to_owned())),
                None => (part, None),
            })
            .collect();
        Self {
            option: option.to_owned(),
            parts,
        }
    }

    /// Splits the value of `option` whose first part is a name or a path, in which `=` means nothing.
    ///
    /// # Errors
    /// When the first part is empty; `expected` says what it should be.
    pub fn parse_with_first(
        option: &str,
        text: &str,
        expected: &str,
    ) -> Result<(String, Self), OptionError> {
        let mut parts = split(text);
        let first = parts.remove(0);
        if first.is_empty() {
            return Err(OptionError::new(
                option,
                format!("expected {expected} first"),
            ));
        }
        let rest = parts
            .iter()
            .map(|p| p.replace(',', ",,"))
            .collect::<Vec<_>>()
            .join(",");
        Ok((first, Self::parse(option, &rest)))
    }

    /// An error about this option.
    pub fn error(&self, message: impl Into<String>) -> OptionError {
        OptionError::new(&self.option, message)
    }

    /// Takes the value of `key`.
    ///
    /// # Errors
    /// When it is given twice or without a value.
    pub fn take(&mut self, key: &str) -> Result<Option<String>, OptionError> {
        let mut values = self.take_all(key)?;
        match values.len() {
            0 => Ok(None),
            1 => Ok(values.pop()),
            _ => Err(self.error(format!("{key}= is given {} times", values.len()))),
        }
    }

    /// Takes all values of `key`, in order.
    ///
    /// # Errors
    /// When one is given without a value.
    pub fn take_all(&mut self, key: &str) -> Result<Vec<String>, OptionError> {
        let mut values = Vec::new();
        let mut rest = Vec::new();
        for (name, value) in std::mem::take(&mut self.parts) {
            match value {
                Some(value) if name == key => values.push(value),
                None if name == key => return Err(self.error(format!("{key} needs a value"))),
                value => rest.push((name, value)),
            }
        }
        self.parts = rest;
        Ok(values)
    }

    /// Takes a switch: `key=on`, `key=off`, or `key` alone for on.
    ///
    /// # Errors
    /// For any other value.
    pub fn take_switch(&mut self, key: &str) -> Result<Option<bool>, OptionError> {
        let Some(at) = self.parts.iter().position(|(name, _)| name == key) else {
            return Ok(None);
        };
        let (_, value) = self.parts.remove(at);
        match value.as_deref() {
            None | Some("on" | "yes" | "true") => Ok(Some(true)),
            Some("off" | "no" | "false") => Ok(Some(false)),
            Some(other) => Err(self.error(format!("{key}={other}: expected on or off"))),
        }
    }

    /// Takes the value of `key` and parses it.
    ///
    /// # Errors
    /// When it does not parse; `expected` says what would.
    pub fn take_parsed<T>(
        &mut self,
        key: &str,
        expected: &str,
        parse: impl Fn(&str) -> Option<T>,
    ) -> Result<Option<T>, OptionError> {
        let Some(text) = self.take(key)? else {
            return Ok(None);
        };
        match parse(&text) {
            Some(value) => Ok(Some(value)),
            None => Err(self.error(format!("{key}={text}: expected {expected}"))),
        }
    }

    /// Ends: every part must have been taken.
    ///
    /// # Errors
    /// Names the first part that was not; `known` lists the keys that there are.
    pub fn finish(self, known: &str) -> Result<(), OptionError> {
        match self.parts.first() {
            None => Ok(()),
            Some((key, _)) => {
                Err(self.error(format!("unknown key '{key}': expected one of {known}")))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commas_double() {
        let (first, mut rest) =
            Options::parse_with_first("--disk", "a,,b=c.img,format=raw,readonly", "a file")
                .unwrap();
        assert_eq!(first, "a,b=c.img");
        assert_eq!(rest.take("format").unwrap().as_deref(), Some("raw"));
        assert_eq!(rest.take_switch("readonly").unwrap(), Some(true));
        rest.finish("").unwrap();
    }

    #[test]
    fn says_what_is_wrong() {
        let wrong = |text: &str| {
            let mut o = Options::parse("--x", text);
            let a = o.take("a").map(|_| ());
            let b = o.take_switch("b").map(|_| ());
            a.and(b).and(o.finish("a, b")).unwrap_err().to_string()
        };
        assert_eq!(wrong("a=1,a=2"), "--x: a= is given 2 times");
        assert_eq!(wrong("a"), "--x: a needs a value");
        assert_eq!(wrong("b=maybe"), "--x: b=maybe: expected on or off");
        assert_eq!(wrong("c=1"), "--x: unknown key 'c': expected one of a, b");
    }
}
