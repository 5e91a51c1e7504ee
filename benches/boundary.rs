//! What the process boundary costs: the same engine on threads of this process, and behind the
//! socket as the gateway runs it, in turn. `cargo bench --bench boundary -- MODEL.gguf [llama-cpp]`
//!
//! The workload is eight streams of 128 tokens after short prompts; the figure is output tokens per
//! second, the median of nine runs each, and their ratio. Not a timed test: the machine decides.

use ingot::engine::Local;
use ingot::ipc::{
    self, Event, FromEngine, Generate, LoadSpec, Prompt, RunnerKind, StopParams, ToEngine,
};
use std::io::{BufReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::time::Instant;

/// The binary's own: its huge pages are worth a fifth of a token's time.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const STREAMS: u64 = 8;
const OUTPUT: u32 = 128;
const RUNS: u64 = 9;

/// Either side of the boundary.
enum Engine {
    Local(Local),
    Process { write: UnixStream, read: BufReader<UnixStream>, child: std::process::Child },
}

impl Engine {
    fn process(spec: &LoadSpec) -> Self {
        let (ours, theirs) = UnixStream::pair().expect("a socket pair");
        let child = Command::new(env!("CARGO_BIN_EXE_ingot"))
            .arg("engine")
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stderr(Stdio::null())
            .spawn()
            .expect("the engine starts");
        let read = BufReader::new(ours.try_clone().expect("a second handle"));
        let mut engine = Self::Process { write: ours, read, child };
        engine.send(ToEngine::Load(spec.clone()));
        engine
    }

    fn send(&mut self, frame: ToEngine) {
        match self {
            Self::Local(local) => local.send(frame),
            Self::Process { write, .. } => {
                write.write_all(&ipc::encode(&frame).expect("it encodes")).expect("it is read");
            }
        }
    }

    fn receive(&mut self) -> FromEngine {
        match self {
            Self::Local(local) => local.frames().recv().expect("the engine lives"),
            Self::Process { read, .. } => ipc::read_frame(read).expect("the engine lives"),
        }
    }

    /// Output tokens per second of one round.
    fn round(&mut self, round: u64) -> f64 {
        let started = Instant::now();
        for stream in 0..STREAMS {
            self.send(ToEngine::Generate(Box::new(request(round * STREAMS + stream + 1))));
        }
        let mut open = STREAMS;
        let mut tokens = 0;
        while open > 0 {
            let FromEngine::Events(events) = self.receive() else { continue };
            for (_, event) in events {
                match event {
                    Event::Delta { tokens: more, .. } => tokens += more,
                    Event::Done { .. } => open -= 1,
                    Event::Failed(error) => panic!("{error}"),
                    _ => {}
                }
            }
        }
        f64::from(tokens) / started.elapsed().as_secs_f64()
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        if let Self::Process { child, .. } = self {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn request(id: u64) -> Generate {
    let text = format!("Story number {id}: once upon a time");
    Generate {
        stop: StopParams { max_tokens: Some(OUTPUT), ignore_eos: true, ..StopParams::default() },
        ..Generate::plain(id, Prompt::Text { text, add_special: true, parse_special: false })
    }
}

fn main() {
    let model = std::env::args().skip(1).find(|argument| !argument.starts_with('-'));
    let Some(model) = model.or_else(|| std::env::var("INGOT_TEST_MODEL").ok()) else {
        println!("name a model: cargo bench --bench boundary -- MODEL.gguf");
        return;
    };
    let threads = std::thread::available_parallelism().map_or(2, |count| count.get() as u32);
    let runner = match std::env::args().any(|argument| argument == "llama-cpp") {
        true => RunnerKind::LlamaCpp,
        false => RunnerKind::Native,
    };
    let spec = LoadSpec { flash_attention: true, threads, ..LoadSpec::plain(model, runner) };
    let local = Local::start(spec.clone()).expect("threads start");
    let mut engines = [("in process", Engine::Local(local)), ("process", Engine::process(&spec))];
    for (name, engine) in &mut engines {
        assert!(matches!(engine.receive(), FromEngine::Loaded(_)), "{name}: the model loads");
        engine.round(0);
    }
    let mut rates = [Vec::new(), Vec::new()];
    for round in 1..=RUNS {
        for ((_, engine), rates) in engines.iter_mut().zip(&mut rates) {
            rates.push(engine.round(round));
        }
    }
    let [inside, outside] = rates.map(|mut rates| {
        rates.sort_by(f64::total_cmp);
        rates[rates.len() / 2]
    });
    println!("in process {inside:.1} tokens/s, across the boundary {outside:.1} tokens/s");
    println!("the boundary takes {:.1}% of throughput", 100.0 * (1.0 - outside / inside));
}
