//! `~/.mlflow/credentials`: user name and password where the environment has none.
//!
//! MLflow reads the file with Python's `configparser`: keys are case-insensitive, `=` and `:` both
//! divide key from value, quotes and backslashes mean themselves, and `%%` stands for `%`. General
//! INI readers differ in the last two, which passwords hold, so the few rules are followed here.

use std::io::ErrorKind;
use std::path::Path;

use super::settings::SettingError;

/// What the file's section `[mlflow]` says; empty values count as absent, as in MLflow.
#[derive(Default)]
pub(super) struct FileCredentials {
    pub username: Option<String>,
    pub password: Option<String>,
}

/// Reads `<home>/.mlflow/credentials`; a file that does not exist says nothing.
///
/// # Errors
/// The file cannot be read, or holds a line that is neither section, comment nor `key = value`.
pub(super) fn read(home: &Path) -> Result<FileCredentials, SettingError> {
    let path = home.join(".mlflow").join("credentials");
    let broken = |detail: String| {
        SettingError::new(format!("{}: {detail}; mend or remove it", path.display()))
    };
    match std::fs::read_to_string(&path) {
        Ok(text) => parse(&text).map_err(|line| {
            // The line itself may be half a password: it is not shown.
            broken(format!(
                "line {line} is neither a [section] nor key = value"
            ))
        }),
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            Ok(FileCredentials::default())
        }
        Err(error) => Err(broken(format!("cannot be read: {error}"))),
    }
}

/// The credentials, or the number of the line that makes no sense.
fn parse(text: &str) -> Result<FileCredentials, usize> {
    let mut credentials = FileCredentials::default();
    let mut ours = false;
    for (index, line) in text.trim_start_matches('\u{feff}').lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with(['#', ';']) {
            continue;
        }
        if let Some(rest) = line.strip_prefix('[') {
            let end = rest.rfind(']').ok_or(index + 1)?;
            ours = &rest[..end] == "mlflow";
            continue;
        }
        let (key, value) = line.split_once(['=', ':']).ok_or(index + 1)?;
        if !ours {
            continue;
        }
        let value = Some(value.trim().replace("%%", "%")).filter(|value| !value.is_empty());
        match key.trim().to_lowercase().as_str() {
            "mlflow_tracking_username" => credentials.username = value,
            "mlflow_tracking_password" => credentials.password = value,
            _ => {}
        }
    }
    Ok(credentials)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_is_read_as_mlflow_reads_it() {
        let text = "\u{feff}# mine\n[other]\nmlflow_tracking_username = no\n\n[mlflow]\n\
                    MLFLOW_TRACKING_USERNAME: alice\n; a comment\n\
                    mlflow_tracking_password = \"p=a:s\\n50%%\"\nunknown = 1\n";
        let read = parse(text).unwrap_or_else(|line| panic!("line {line}"));
        assert_eq!(read.username.as_deref(), Some("alice"));
        assert_eq!(read.password.as_deref(), Some("\"p=a:s\\n50%\""));
    }

    #[test]
    fn an_empty_value_is_no_value() {
        let read = parse("[mlflow]\nmlflow_tracking_username =\n").unwrap_or_default();
        assert!(read.username.is_none());
    }

    #[test]
    fn a_line_that_makes_no_sense_is_named_by_number_and_not_shown() {
        let home = tempfile::tempdir().unwrap();
        assert!(read(home.path()).is_ok_and(|none| none.username.is_none()));
        std::fs::create_dir(home.path().join(".mlflow")).unwrap();
        let text = "[mlflow]\nhalf-a-password\n";
        std::fs::write(home.path().join(".mlflow/credentials"), text).unwrap();
        let error = read(home.path()).err().map(|error| error.to_string());
        let error = error.unwrap_or_default();
        assert!(error.contains("line 2") && error.contains("credentials"));
        assert!(!error.contains("half-a-password"));
    }
}
