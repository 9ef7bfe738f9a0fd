//! Passwords of encrypted images: `--object secret`, and image names that are options (`--image-opts`).

use image_formats::luks::Secret;

use super::Failure;
use super::args::{Parsed, key_values};

/// Reads the objects that are given. Only secrets are known. No message shows what a secret holds.
pub(crate) fn objects(texts: &[(char, &str)]) -> Result<Vec<(String, Secret)>, Failure> {
    texts.iter().map(|text| object(*text)).collect()
}

fn object(text: (char, &str)) -> Result<(String, Secret), Failure> {
    let (mut id, mut data, mut file) = (None, None, None);
    let mut kind = None;
    for (key, value) in key_values(&[text]) {
        match key.as_str() {
            "secret" if kind.is_none() => kind = Some("secret".to_owned()),
            "qom-type" => kind = Some(value),
            "id" => id = Some(value),
            "data" => data = Some(value),
            "file" => file = Some(value),
            "format" if value == "raw" => {}
            "format" => {
                let message = "--object: only secrets with format=raw are supported";
                return Err(Failure::plain(message));
            }
            // What stands first without a value is the type; it holds no password.
            _ if kind.is_none() => return Err(unknown_kind()),
            // It may be what follows a comma in a password: so it is not shown.
            _ => {
                let message =
                    "--object secret: unknown parameter (a comma in data is written twice)";
                return Err(Failure::plain(message));
            }
        }
    }
    if kind.as_deref() != Some("secret") {
        return Err(unknown_kind());
    }
    let id = id.ok_or_else(|| Failure::plain("Parameter 'id' is missing"))?;
    let secret = match (data, file) {
        (Some(data), None) => Secret::new(data.as_bytes()),
        (None, Some(file)) => {
            Secret::read(file.as_ref()).map_err(|e| Failure::plain(e.one_line()))?
        }
        (Some(_), Some(_)) => {
            let message = "'file' and 'data' are mutually exclusive";
            return Err(Failure::plain(message));
        }
        (None, None) => return Err(Failure::plain("Must provide 'file' or 'data'")),
    };
    Ok((id, secret))
}

fn unknown_kind() -> Failure {
    Failure::plain("--object: expected secret,id=ID,data=TEXT or secret,id=ID,file=FILE")
}

/// The secret with this id.
pub(crate) fn find(secrets: &[(String, Secret)], id: &str) -> Result<Secret, Failure> {
    let found = secrets.iter().find(|(name, _)| name == id);
    found
        .map(|(_, secret)| secret.clone())
        .ok_or_else(|| Failure::plain(format!("No secret with id '{id}'")))
}

/// Replaces image names that are options by file names, format and password. A name without `=` stays.
pub(crate) fn image_options(parsed: &mut Parsed) -> Result<(), Failure> {
    for at in 0..parsed.names.len() {
        let text = parsed.names[at].clone();
        if !text.contains('=') {
            continue;
        }
        let (mut driver, mut file) = (None, None);
        for (key, value) in key_values(&[('I', &text)]) {
            match key.as_str() {
                "driver" | "format" => driver = Some(value),
                "file.filename" | "filename" | "file" => file = Some(value),
                "file.driver" if value == "file" => {}
                "encrypt.format" if value == "luks" => {}
                "key-secret" | "encrypt.key-secret" => {
                    parsed.key = Some(find(&parsed.secrets, &value)?)
                }
                _ => {
                    return Err(Failure::plain(format!(
                        "--image-opts: '{key}' is not supported: expected driver, file.filename, \
                         key-secret or encrypt.key-secret"
                    )));
                }
            }
        }
        let missing = || Failure::plain("--image-opts: expected file.filename=FILE");
        parsed.names[at] = file.ok_or_else(missing)?;
        if let Some(driver) = driver.filter(|d| d != "file") {
            parsed.add('f', &driver);
        }
    }
    Ok(())
}
