//! MLflow's own switches for the store behind a server: whether clients turn to it.

use thiserror::Error;

const UPLOADS: &str = "MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD";
const DOWNLOADS: &str = "MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD";

/// What was set; otherwise the server says what it offers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Switches {
    /// Parts go straight to the store behind the server.
    pub uploads: Option<bool>,
    /// Ranges come straight from it.
    pub downloads: Option<bool>,
}

/// A variable that says neither yes nor no.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("{name}: {value:?} is not true or false")]
pub struct NoSwitch {
    name: &'static str,
    value: String,
}

impl Switches {
    /// Reads MLflow's variables.
    ///
    /// # Errors
    /// One of them is set to something else than true, false, 1 or 0.
    pub fn from_variables(variable: impl Fn(&str) -> Option<String>) -> Result<Self, NoSwitch> {
        let switch = |name| {
            let Some(value) = variable(name).filter(|value| !value.is_empty()) else {
                return Ok(None);
            };
            match value.to_lowercase().as_str() {
                "true" | "1" => Ok(Some(true)),
                "false" | "0" => Ok(Some(false)),
                _ => Err(NoSwitch { name, value }),
            }
        };
        Ok(Self {
            uploads: switch(UPLOADS)?,
            downloads: switch(DOWNLOADS)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(value: &str) -> Result<Switches, NoSwitch> {
        Switches::from_variables(|name| (name == UPLOADS).then(|| value.to_owned()))
    }

    #[test]
    fn a_switch_is_what_mlflow_takes_for_one() {
        assert_eq!(of("").unwrap(), Switches::default());
        assert_eq!(of("True").unwrap().uploads, Some(true));
        assert_eq!(of("0").unwrap().uploads, Some(false));
        let told = of("yes").unwrap_err().to_string();
        assert_eq!(told, format!("{UPLOADS}: \"yes\" is not true or false"));
    }
}
