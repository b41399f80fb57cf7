//! Compiles the CUDA kernels, where there is a compiler: the only caller of nvcc in a build.
//!
//! Every `kernels/*.cu` becomes a compressed fatbin with machine code for Ampere (8.0, 8.6), Ada
//! (8.9) and Hopper (9.0a), and PTX for whatever comes after. Without nvcc the binary carries none
//! and says so when it is asked for CUDA; nothing else differs. nvcc is `$TOKENMILL_NVCC` or that
//! of `$CUDA_HOME`, `$CUDA_PATH` or `$PATH`. A change of `$PATH` alone rebuilds nothing, because
//! editors and shells have different ones.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::{env, fs, thread};

const FLAGS: &[&str] = &[
    "-std=c++20",
    "-O3",
    "-fatbin",
    "-Xfatbin=-compress-all",
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_86,code=sm_86",
    "-gencode=arch=compute_89,code=sm_89",
    "-gencode=arch=compute_90a,code=sm_90a",
    "-gencode=arch=compute_90,code=compute_90",
];

/// Drivers read a fatbin's header as integers of eight bytes.
const ALIGNED: &str = "#[repr(align(64))]\nstruct Aligned<T: ?Sized>(T);\n\n";
const KERNELS: &str = "/// One per file; none in a binary that was built without nvcc.\n\
                       pub static KERNELS: &[Image] = &[\n";

fn main() {
    for variable in ["TOKENMILL_NVCC", "CUDA_HOME", "CUDA_PATH"] {
        println!("cargo:rerun-if-env-changed={variable}");
    }
    println!("cargo:rerun-if-changed=kernels");
    println!("cargo:rerun-if-changed=build.rs");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let fatbins = nvcc().map_or_else(Vec::new, |nvcc| compile_all(&nvcc, &out));
    let entry = |path: &PathBuf| {
        let name = path.file_stem().expect("a kernel file").to_string_lossy();
        let path = path.display().to_string();
        format!("    Image {{ name: {name:?}, fatbin: &Aligned(*include_bytes!({path:?})).0 }},\n")
    };
    let entries: String = fatbins.iter().map(entry).collect();
    let aligned = if fatbins.is_empty() { "" } else { ALIGNED };
    let table = format!("{aligned}{KERNELS}{entries}];\n");
    fs::write(out.join("kernels.rs"), table).expect("OUT_DIR can be written");
}

/// The compiler; panics when the one that was asked for is not there.
fn nvcc() -> Option<PathBuf> {
    if let Some(given) = env::var_os("TOKENMILL_NVCC") {
        let path = PathBuf::from(given);
        assert!(path.is_file(), "TOKENMILL_NVCC: there is no {}", path.display());
        return Some(path);
    }
    let homes = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(env::var_os);
    let homes = homes.map(|home| Path::new(&home).join("bin"));
    let paths = env::var_os("PATH").unwrap_or_default();
    let folders: Vec<PathBuf> = homes.chain(env::split_paths(&paths)).collect();
    let name = format!("nvcc{}", env::consts::EXE_SUFFIX);
    folders.into_iter().map(|folder| folder.join(&name)).find(|path| path.is_file())
}

/// Compiles all kernels, as many at a time as cargo has jobs.
fn compile_all(nvcc: &Path, out: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir("kernels").expect("kernels/ exists");
    let mut kernels: Vec<PathBuf> =
        entries.map(|entry| entry.expect("kernels/ can be listed").path()).collect();
    kernels.retain(|path| path.extension().is_some_and(|extension| extension == "cu"));
    kernels.sort();
    let jobs = env::var("NUM_JOBS").ok().and_then(|jobs| jobs.parse().ok()).unwrap_or(1);
    let rest = Mutex::new(kernels.iter());
    thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| {
                loop {
                    let next = rest.lock().expect("no compilation failed").next();
                    let Some(kernel) = next else { break };
                    compile(nvcc, kernel, &fatbin_of(kernel, out));
                }
            });
        }
    });
    kernels.iter().map(|kernel| fatbin_of(kernel, out)).collect()
}

fn fatbin_of(kernel: &Path, out: &Path) -> PathBuf {
    out.join(kernel.file_name().expect("a kernel file")).with_extension("fatbin")
}

/// Compiles one file; panics with the compiler's words.
fn compile(nvcc: &Path, kernel: &Path, fatbin: &Path) {
    let mut command = Command::new(nvcc);
    command.args(FLAGS).arg("-Ikernels/include").arg(kernel).arg("-o").arg(fatbin);
    let output = command.output();
    let output = output.unwrap_or_else(|error| panic!("{} cannot run: {error}", nvcc.display()));
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?} failed:\n{words}");
}
