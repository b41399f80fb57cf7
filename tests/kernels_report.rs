//! The committed table of what nvcc makes of the kernels is what nvcc makes of them.

use std::path::Path;
use std::process::Command;

/// `NVCC=/path/to/nvcc cargo test --release --test kernels_report -- --ignored`, as `.ci/run` does.
#[test]
#[ignore = "needs nvcc"]
fn kernels_compile_for_every_target_as_the_committed_report_says() {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/kernels-report.py");
    let output = Command::new("python3").arg(script).arg("--check").output();
    let output = output.expect("python3 runs");
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "run scripts/kernels-report.py and commit:\n{words}");
}
