//! Servers on the stub driver, each in a process of its own.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::LazyLock;

use serde_json::{Value, json};
use tempfile::TempDir;
use tokenmill::ops::cuda::Image;

use crate::client::{Client, Reply};
use crate::shim::build;

/// Flags of `serve` for the process that serves.
pub const FLAGS_VARIABLE: &str = "TOKENMILL_TEST_SERVE";

/// Flags that every server here has.
const FLAGS: &str = "--port 0 --shutdown-timeout 1 --max-num-batched-tokens 64";
/// Few sequences and short contexts, because the SIMT machine is slow.
const SMALL: &str = "--max-num-seqs 4 --max-model-len 96";

/// The compiled kernels and the folder of the driver's library.
struct Built {
    kernels: Vec<PathBuf>,
    folder: PathBuf,
}

static BUILT: LazyLock<Built> = LazyLock::new(|| {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/driver/libcuda.cc");
    let library = build::library_path(&source);
    let folder = library.with_extension("");
    fs::create_dir_all(&folder).unwrap();
    // Both names by which it is looked for, so that no real driver is found before it.
    for name in ["libcuda.so", "libcuda.so.1"] {
        let unfinished = folder.join(format!("{name}.{}", std::process::id()));
        std::os::unix::fs::symlink(&library, &unfinished).unwrap();
        fs::rename(unfinished, folder.join(name)).unwrap();
    }
    Built { kernels: build::kernel_paths(), folder }
});

/// An image per kernel file, which the stub knows by its name.
pub fn images() -> &'static [Image] {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let files = entries.filter(|path| path.extension().is_some_and(|found| found == "cu"));
    let image = |path: PathBuf| {
        let name: &'static str = path.file_stem().unwrap().to_string_lossy().into_owned().leak();
        Image { name, fatbin: format!("stub:{name}\0").leak().as_bytes() }
    };
    files.map(image).collect::<Vec<_>>().leak()
}

/// How a server is started.
pub struct Setup {
    flags: String,
    variables: Vec<(&'static str, String)>,
}

impl Setup {
    /// A small server of the bundled model with these flags beside.
    pub fn new(flags: &str) -> Setup {
        Setup::of_any_size(&format!("{SMALL} {flags}"))
    }

    /// A server of the bundled model with these flags.
    pub fn of_any_size(flags: &str) -> Setup {
        Setup { flags: format!("{FLAGS} {flags}"), variables: Vec::new() }
    }

    /// The same with a variable in its environment.
    pub fn with(mut self, variable: &'static str, value: &dyn ToString) -> Setup {
        self.variables.push((variable, value.to_string()));
        self
    }

    fn spawn(&self) -> Process {
        let folder = TempDir::new().unwrap();
        let log = File::create(folder.path().join("log")).unwrap();
        let kernels: Vec<_> = BUILT.kernels.iter().map(|path| path.to_str().unwrap()).collect();
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args(["--exact", "serves_what_the_environment_says", "--ignored", "--nocapture"])
            .env(FLAGS_VARIABLE, &self.flags)
            .env("LD_LIBRARY_PATH", &BUILT.folder)
            .env("STUB_CUDA_KERNELS", kernels.join(":"))
            .env("STUB_CUDA_TRACE", folder.path().join("trace"))
            .envs(self.variables.iter().map(|(variable, value)| (variable, value)))
            .stdout(Stdio::piped())
            .stderr(log);
        Process { child: command.spawn().unwrap(), folder }
    }

    /// Starts it and waits until it serves.
    pub fn start(&self) -> Server {
        let mut process = self.spawn();
        let mut output = BufReader::new(process.child.stdout.take().unwrap());
        let address = loop {
            let mut line = String::new();
            let read = output.read_line(&mut line).unwrap();
            assert!(read > 0, "the server ended:\n{}", process.log());
            let url = line.split_once(" on http://").and_then(|(_, rest)| rest.split_once("/v1"));
            if let Some((address, _)) = url {
                break address.to_owned();
            }
        };
        // Nobody else empties the pipe, and a full one would stop the server.
        std::thread::spawn(move || std::io::copy(&mut output, &mut std::io::sink()));
        Server { client: Client::new(address.parse().unwrap()), process }
    }

    /// Starts it, sees it end, and returns its last words.
    pub fn failure(&self) -> String {
        let mut process = self.spawn();
        let mut output = process.child.stdout.take().unwrap();
        output.read_to_end(&mut Vec::new()).unwrap();
        let status: ExitStatus = process.child.wait().unwrap();
        let log = process.log();
        assert_eq!(status.code(), Some(1), "{log}");
        let is_error = |line: &&str| line.starts_with("error: ");
        let errors: Vec<&str> = log.lines().filter(is_error).collect();
        assert_eq!(errors.len(), 1, "one error in one line:\n{log}");
        errors[0].to_owned()
    }
}

/// A process that ends with the test.
struct Process {
    child: Child,
    folder: TempDir,
}

impl Process {
    fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("log")).unwrap()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A running server.
pub struct Server {
    pub client: Client,
    process: Process,
}

impl Server {
    /// What it has logged.
    pub fn log(&self) -> String {
        self.process.log()
    }

    /// What the driver was asked for so far, a line each.
    pub fn trace(&self) -> Vec<String> {
        let text = fs::read_to_string(self.process.folder.path().join("trace")).unwrap();
        text.lines().map(str::to_owned).collect()
    }

    /// Answers to prompts that are sent at the same time.
    pub fn answers(&self, bodies: &[Value]) -> Vec<Reply> {
        std::thread::scope(|scope| {
            let ask = |body| scope.spawn(move || self.client.post("/v1/chat/completions", body));
            let asked: Vec<_> = bodies.iter().map(ask).collect();
            asked.into_iter().map(|answer| answer.join().unwrap()).collect()
        })
    }

    /// Texts of answers that must succeed.
    pub fn texts(&self, bodies: &[Value]) -> Vec<String> {
        let text = |reply: Reply| {
            assert_eq!(reply.status, 200, "{}\n{}", reply.body, self.log());
            let body = reply.json();
            body["choices"][0]["message"]["content"].as_str().unwrap().to_owned()
        };
        self.answers(bodies).into_iter().map(text).collect()
    }
}

/// A question to the bundled model, answered greedily.
pub fn greedy(question: &str, max_tokens: u32) -> Value {
    json!({
        "messages": [{"role": "user", "content": question}],
        "max_tokens": max_tokens,
        "temperature": 0
    })
}
