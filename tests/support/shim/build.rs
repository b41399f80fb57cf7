//! Compiles kernels for the SIMT machine.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

use libloading::Library;
use sha2::{Digest, Sha256};

/// Additional flags of the compiler, for example `-fsanitize=address,undefined`.
const FLAGS_VARIABLE: &str = "TOKENMILL_SIMT_FLAGS";

/// Rounding is that of the source: no product is merged with a sum. Kernels look at the same
/// memory as several types, as PTX does.
const FLAGS: &[&str] = &[
    "-std=c++20",
    "-O2",
    "-march=native",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-fvisibility=hidden",
    "-fPIC",
    "-shared",
    "-g1",
    "-Wall",
    "-Wno-unknown-pragmas",
];

/// One library per kernel file, compiled unless that was done before.
pub fn kernel_libraries() -> Vec<Library> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
    libraries_of(&sources(&folder, "cu"), &folder.join("include"))
}

/// Where these libraries are, for who loads them elsewhere.
pub fn kernel_paths() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
    paths_of(&sources(&folder, "cu"), &folder.join("include"))
}

/// A library of C++ that is no kernel, compiled in the same way.
pub fn library_path(source: &Path) -> PathBuf {
    let include = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels/include");
    paths_of(&[source.to_owned()], &include).remove(0)
}

/// The kernels that test the machine itself.
pub fn test_libraries() -> Vec<Library> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    libraries_of(
        &sources(&root.join("tests/conformance/broken"), "cu"),
        &root.join("kernels/include"),
    )
}

/// Libraries of the kernels of one file, each with a machine of its own: they run side by side.
pub fn copies_of(kernel_file: &str, count: usize) -> Vec<Library> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
    let built = paths_of(&[folder.join(kernel_file)], &folder.join("include")).remove(0);
    let copy = |i: usize| {
        let path = built.with_extension(format!("{i}.{}.so", std::process::id()));
        fs::copy(&built, &path).expect("the target folder can be written");
        // SAFETY: as below.
        let library = unsafe { Library::new(&path).expect("it was just copied") };
        fs::remove_file(&path).expect("what was loaded needs no name");
        library
    };
    (0..count).map(copy).collect()
}

/// One library per file.
fn libraries_of(kernels: &[PathBuf], include: &Path) -> Vec<Library> {
    let built = paths_of(kernels, include);
    // SAFETY: initialising a library only lists its kernels.
    built.iter().map(|path| unsafe { Library::new(path).expect("it was just built") }).collect()
}

/// Where they are, compiled unless that was done before.
fn paths_of(kernels: &[PathBuf], include: &Path) -> Vec<PathBuf> {
    let extra = std::env::var(FLAGS_VARIABLE).unwrap_or_default();
    let flags: Vec<&str> = FLAGS.iter().copied().chain(extra.split_whitespace()).collect();
    let mut headers = Sha256::new();
    for flag in &flags {
        headers.update(flag);
    }
    for header in sources(include, "h").into_iter().chain(sources(include, "cuh")) {
        headers.update(fs::read(header).expect("headers can be read"));
    }
    // Two compilers at once: as many cores as the smallest machines have.
    let rest = Mutex::new(kernels.iter());
    let built = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                loop {
                    let Some(kernel) = rest.lock().unwrap().next() else { break };
                    let library = compiled(kernel, include, &flags, headers.clone());
                    built.lock().unwrap().push(library);
                }
            });
        }
    });
    let mut built = built.into_inner().unwrap();
    built.sort();
    built
}

fn sources(folder: &Path, extension: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).expect("the folder exists");
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.extension().is_some_and(|found| found == extension));
    files.sort();
    files
}

/// The library of a kernel file; panics with the compiler's words.
fn compiled(kernel: &Path, include: &Path, flags: &[&str], mut hash: Sha256) -> PathBuf {
    hash.update(fs::read(kernel).expect("kernels can be read"));
    let hash: String = hash.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    let name = kernel.file_stem().expect("a file").to_string_lossy().into_owned();
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("simt");
    let library = folder.join(format!("{name}-{hash}.so"));
    if library.exists() {
        return library;
    }
    fs::create_dir_all(&folder).expect("the target folder can be written");
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
    // Under a name of this process until it is whole: other test binaries build the same.
    let unfinished = folder.join(format!("{name}-{hash}.{}", std::process::id()));
    let mut command = Command::new(&compiler);
    command.args(flags).arg("-I").arg(include).args(["-x", "c++"]).arg(kernel);
    let output = command.arg("-o").arg(&unfinished).output();
    let output = output.unwrap_or_else(|error| panic!("{compiler} cannot be run: {error}"));
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}:\n{words}");
    fs::rename(&unfinished, &library).expect("the target folder can be written");
    library
}
