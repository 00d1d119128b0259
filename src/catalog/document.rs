//! What MLflow knows of a run or a model, as files.

use std::sync::Arc;

use bytes::Bytes;
use serde_json::{Map, Value};

use super::{Catalog, CatalogError, RootId};

/// A file about a run or a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Document {
    Run,
    Params,
    Metrics,
    Tags,
    Model,
}

const OF_RUN: &[(&str, Document)] = &[
    ("run.json", Document::Run),
    ("params.json", Document::Params),
    ("metrics.json", Document::Metrics),
    ("tags.json", Document::Tags),
];
const OF_MODEL: &[(&str, Document)] = &[("model.json", Document::Model)];

impl RootId {
    /// The files about it, by name.
    pub fn documents(&self) -> &'static [(&'static str, Document)] {
        match self {
            Self::Run(_) => OF_RUN,
            Self::Model(_) => OF_MODEL,
            Self::Version { .. } => &[],
        }
    }
}

impl Catalog {
    /// What such a file says now.
    ///
    /// # Errors
    /// `NotFound`; the server's.
    pub async fn document(
        self: &Arc<Self>,
        id: &RootId,
        document: Document,
    ) -> Result<Bytes, CatalogError> {
        let told = match id {
            RootId::Run(run_id) => self.tracking.run_document(run_id).await,
            RootId::Model(model_id) => self.tracking.model_document(model_id).await,
            RootId::Version { .. } => return Err(self.missing(id)),
        };
        let told = self.noted(told)?;
        let data = &told["data"];
        let shown = match document {
            Document::Run | Document::Model => told,
            Document::Params => by_key(&data["params"], |it| it["value"].clone()),
            Document::Tags => by_key(&data["tags"], |it| it["value"].clone()),
            Document::Metrics => by_key(&data["metrics"], |it| {
                let mut rest = it.as_object().cloned().unwrap_or_default();
                rest.remove("key");
                Value::Object(rest)
            }),
        };
        let mut text = format!("{shown:#}");
        text.push('\n');
        Ok(text.into())
    }
}

/// A list of keys and more as an object.
fn by_key(list: &Value, rest: impl Fn(&Value) -> Value) -> Value {
    let items = list.as_array().into_iter().flatten();
    let pairs = items.map(|item| {
        let key = item["key"].as_str().unwrap_or_default();
        (key.to_owned(), rest(item))
    });
    Value::Object(pairs.collect::<Map<String, Value>>())
}
