//! `tokenmill doctor`: what this machine has, what would be chosen, and whether it computes right.
//!
//! | file | what |
//! |---|---|
//! | `machine` | processor, memory, driver, GPUs, as facts |
//! | `verify` | a handful of cases of every operation against the referee |
//! | `cases` | those cases |

mod cases;
mod latent;
mod machine;
mod verify;

use anyhow::{Context, ensure};
use clap::Args;
use serde::Serialize;

use crate::config::{DeviceArgs, DeviceConfig};
use crate::device::RankContext;
use machine::Machine;
use verify::Verdict;

/// Flags of `doctor`.
#[derive(Clone, Debug, Args)]
pub struct DoctorArgs {
    /// Device flags.
    #[command(flatten)]
    pub device: DeviceArgs,

    /// Compute a few cases of every operation on the chosen device and compare with plain loops
    #[arg(long)]
    pub verify: bool,

    /// Print JSON instead of text
    #[arg(long)]
    pub json: bool,
}

/// All that is reported.
#[derive(Debug, Serialize)]
struct Report {
    version: &'static str,
    machine: Machine,
    chosen: Chosen,
    /// With `--verify`, and a device to verify.
    #[serde(skip_serializing_if = "Option::is_none")]
    verify: Option<Vec<Verdict>>,
}

/// What the device flags mean here.
#[derive(Debug, Serialize)]
struct Chosen {
    /// The device's name, when there is one.
    device: Option<String>,
    /// Why it is not the one that was asked for, or not a GPU.
    reason: Option<String>,
}

/// Reports; an error when the device cannot be used or computes wrongly.
pub fn run(args: DoctorArgs) -> anyhow::Result<()> {
    let DoctorArgs { device, verify, json } = args;
    let config = device.resolve([])?;
    let machine = Machine::here();
    let rank = RankContext::open(&config);
    let chosen = chosen(&config, &machine, &rank);
    let verdicts = match (&rank, verify) {
        (Ok(rank), true) => Some(verify::verify(&*rank.ops).context("the device failed")?),
        _ => None,
    };
    let report = Report { version: env!("CARGO_PKG_VERSION"), machine, chosen, verify: verdicts };
    if json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print!("{}", report.text());
    }
    rank?;
    let verdicts = report.verify.unwrap_or_default();
    let wrong = verdicts.iter().filter(|verdict| !verdict.passed).count();
    ensure!(wrong == 0, "{wrong} of {} cases are wrong on this device", verdicts.len());
    Ok(())
}

fn chosen<E: std::fmt::Display>(
    config: &DeviceConfig,
    machine: &Machine,
    rank: &Result<RankContext, E>,
) -> Chosen {
    let reason = match rank {
        Err(error) => Some(error.to_string()),
        Ok(_) => config.why_cpu().or_else(|| machine.why_no_gpu()),
    };
    Chosen { device: rank.as_ref().ok().map(|rank| rank.ops.name()), reason }
}

impl Report {
    /// For people.
    fn text(&self) -> String {
        let mut text = format!("tokenmill {}\n{}", self.version, self.machine);
        let device = self.chosen.device.as_deref().unwrap_or("none");
        let reason = self.chosen.reason.as_ref().map_or(String::new(), |why| format!(" ({why})"));
        text += &format!("chosen     {device}{reason}\n");
        let Some(verdicts) = &self.verify else { return text };
        text.push('\n');
        for verdict in verdicts {
            text += &format!("{verdict}\n");
        }
        let passed = verdicts.iter().filter(|verdict| verdict.passed).count();
        text + &format!("{passed} of {} cases agree with the referee\n", verdicts.len())
    }
}
