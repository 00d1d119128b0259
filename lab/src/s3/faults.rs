//! Failing on a schedule.

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::stats::Kind;

/// What goes wrong.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fault {
    /// An error answer, without doing anything: HTTP status and S3 code.
    Status(u16, String),
    /// The connection is closed without an answer, and nothing is done.
    ResetBefore,
    /// The answer's body breaks off after so many bytes.
    ResetAfter(u64),
    /// The answer's body stalls for so many milliseconds after its first frame.
    Stall(u64),
    /// The answer says that it carries only so many bytes, and does, whatever Content-Range says.
    Truncate(u64),
    /// Nothing is read of the body, and nothing is answered.
    Deaf,
    /// The body is read, and nothing is answered.
    Silent,
    /// One byte of the body is wrong, whichever way it goes.
    WrongByte,
    /// It is done, and answered with 504.
    DoThenFail,
    /// It is done, and the connection is closed without an answer.
    DoThenReset,
}

/// Which requests a fault hits.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Rule {
    /// `None`: any kind.
    pub kind: Option<Kind>,
    /// Part of the key.
    #[serde(default)]
    pub key: String,
    /// How likely each matching request is hit, 0 to 1.
    #[serde(default = "always")]
    pub probability: f64,
    /// How many are hit at most; `None`: no limit.
    #[serde(default)]
    pub times: Option<u64>,
    pub fault: Fault,
}

fn always() -> f64 {
    1.0
}

impl Rule {
    /// The next request of `kind` is hit, once.
    pub fn once(kind: Kind, fault: Fault) -> Self {
        Self {
            kind: Some(kind),
            key: String::new(),
            probability: 1.0,
            times: Some(1),
            fault,
        }
    }

    /// Every request of `kind` is hit.
    pub fn every(kind: Kind, fault: Fault) -> Self {
        Self {
            times: None,
            ..Self::once(kind, fault)
        }
    }
}

#[derive(Debug, Default)]
struct State {
    seed: u64,
    rules: Vec<Rule>,
}

/// The schedule in force.
#[derive(Debug, Default)]
pub(super) struct Faults {
    state: Mutex<State>,
}

impl Faults {
    pub fn set(&self, seed: u64, rules: Vec<Rule>) {
        // The generator must not start at zero.
        *self.state.lock() = State {
            seed: seed | 1,
            rules,
        };
    }

    pub fn next(&self, kind: Kind, key: &str) -> Option<Fault> {
        let mut state = self.state.lock();
        let State { seed, rules } = &mut *state;
        for rule in rules {
            let matches = rule.kind.is_none_or(|wanted| wanted == kind) && key.contains(&rule.key);
            if !matches || rule.times == Some(0) || random(seed) >= rule.probability {
                continue;
            }
            rule.times = rule.times.map(|times| times - 1);
            return Some(rule.fault.clone());
        }
        None
    }
}

/// xorshift64*, in 0..1: the same seed gives the same schedule.
fn random(seed: &mut u64) -> f64 {
    *seed ^= *seed >> 12;
    *seed ^= *seed << 25;
    *seed ^= *seed >> 27;
    (seed.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11) as f64 / (1_u64 << 53) as f64
}
