//! `tokenmill doctor`: what this machine has, what would be chosen, and whether it computes right.
//!
//! | file | what |
//! |---|---|
//! | `machine` | processor, memory, driver, GPUs, as facts |
//! | `chosen` | the device that the flags mean, and what computes there |
//! | `verify` | a handful of cases of every operation against the referee |
//! | `cases`, `attention`, `latent`, `sampling` | those cases |
//! | `weights` | the formats that products are tried with |

mod attention;
mod cases;
mod chosen;
mod latent;
mod machine;
mod sampling;
mod verify;
mod weights;

use std::path::PathBuf;

use anyhow::{Context, ensure};
use clap::Args;
use serde::Serialize;
use serde_json::json;

use super::bench::record::{Kind, Measured, RecordArgs, Recorder};
use crate::config::DeviceArgs;
use crate::device::RankContext;
use chosen::Chosen;
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

    /// Write what was verified as a record for `bench report`
    #[arg(long, value_name = "FILE", requires = "verify")]
    pub output_json: Option<PathBuf>,
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

/// Reports; an error when the device cannot be used or computes wrongly.
pub fn run(args: DoctorArgs) -> anyhow::Result<()> {
    let DoctorArgs { device, verify, json, output_json } = args;
    let config = device.resolve([])?;
    let machine = Machine::here();
    let rank = RankContext::open(&config);
    let chosen = Chosen::new(&config, machine.why_no_gpu(), &rank)?;
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
    if let Some(path) = output_json {
        write(path, &report)?;
    }
    let verdicts = report.verify.unwrap_or_default();
    let wrong = verdicts.iter().filter(|verdict| !verdict.passed).count();
    ensure!(wrong == 0, "{wrong} of {} cases are wrong on this device", verdicts.len());
    Ok(())
}

/// Keeps the cases, and on what they ran.
fn write(path: PathBuf, report: &Report) -> anyhow::Result<()> {
    let args = RecordArgs { output_json: Some(path), ..RecordArgs::default() };
    let model = json!({"backend": report.chosen.device});
    let results =
        json!({"cases": report.verify, "machine": report.machine, "chosen": report.chosen});
    Recorder::begin(args, Measured::Elsewhere)?.write(Kind::Verify, model, json!({}), &results)
}

impl Report {
    /// For people.
    fn text(&self) -> String {
        let mut text = format!("tokenmill {}\n{}", self.version, self.machine);
        text += &self.chosen.to_string();
        let Some(verdicts) = &self.verify else { return text };
        text.push('\n');
        for verdict in verdicts {
            text += &format!("{verdict}\n");
        }
        let passed = verdicts.iter().filter(|verdict| verdict.passed).count();
        text + &format!("{passed} of {} cases agree with the referee\n", verdicts.len())
    }
}
