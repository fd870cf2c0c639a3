//! Whether a harness's own work goes on: a ticker and a signal on the thread that does it.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::runtime::{Builder, Runtime};

const TICK: Duration = Duration::from_millis(100);
/// What the ticker may be late by.
const LATE: Duration = Duration::from_millis(100);
/// What a signal may take to be heard.
const HEARD: Duration = Duration::from_secs(1);

/// Where agents, upstreams and the gateway are: not where the harness's own work is done.
pub(crate) fn outside() -> Runtime {
    Builder::new_multi_thread().worker_threads(2).thread_stack_size(16 << 20).enable_all().build().unwrap()
}

/// The thread that a harness's process has for its own work.
pub(crate) fn inside() -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

/// The worst lateness so far, in microseconds.
#[derive(Clone, Default)]
struct Worst(Arc<AtomicU64>);

impl Worst {
    fn saw(&self, late: Duration) {
        self.0.fetch_max(u64::try_from(late.as_micros()).unwrap(), Ordering::Relaxed);
    }

    fn so_far(&self) -> Duration {
        Duration::from_micros(self.0.load(Ordering::Relaxed))
    }
}

/// A ticker, and a signal that is raised again and again, beside the harness's own work; and the machine's own lateness, by a thread that
/// does nothing else.
pub(crate) struct Watched {
    ticks: Worst,
    signals: Worst,
    machine: Worst,
    over: Arc<AtomicBool>,
}

impl Watched {
    /// Called where the harness's own work is done.
    pub(crate) fn begin() -> Self {
        let watched = Self {
            ticks: Worst::default(),
            signals: Worst::default(),
            machine: Worst::default(),
            over: Arc::default(),
        };
        let ticks = watched.ticks.clone();
        tokio::spawn(async move {
            let mut tick = tokio::time::interval(TICK);
            tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            loop {
                let due = tick.tick().await;
                ticks.saw(due.elapsed());
            }
        });
        let (machine, over) = (watched.machine.clone(), watched.over.clone());
        std::thread::spawn(move || {
            while !over.load(Ordering::Relaxed) {
                let before = Instant::now();
                std::thread::sleep(TICK);
                machine.saw(before.elapsed().saturating_sub(TICK));
            }
        });
        let (signals, over) = (watched.signals.clone(), watched.over.clone());
        let mut heard = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::user_defined1()).unwrap();
        let (raised, mut was_raised) = tokio::sync::mpsc::unbounded_channel();
        std::thread::spawn(move || {
            while !over.load(Ordering::Relaxed) {
                let _ = raised.send(Instant::now());
                raise();
                std::thread::sleep(Duration::from_secs(1));
            }
        });
        tokio::spawn(async move {
            while let Some(at) = was_raised.recv().await {
                let _ = heard.recv().await;
                signals.saw(at.elapsed());
            }
        });
        watched
    }

    /// What was seen. The machine may be late by itself, with other tests beside this one.
    #[expect(clippy::print_stdout, reason = "the worst is what is asked for")]
    pub(crate) fn is_in_time(&self) {
        self.over.store(true, Ordering::Relaxed);
        let (ticks, signals, machine) = (self.ticks.so_far(), self.signals.so_far(), self.machine.so_far());
        println!("worst: ticker {ticks:?}, signal {signals:?}, the machine by itself {machine:?}");
        assert!(ticks <= LATE + machine * 4, "the ticker was late by {ticks:?}, the machine by itself by {machine:?}");
        assert!(
            signals <= HEARD + machine * 4,
            "a signal was heard after {signals:?}, the machine by itself was late by {machine:?}"
        );
    }
}

fn raise() {
    let pid = std::process::id().to_string();
    std::process::Command::new("kill").args(["-USR1", &pid]).status().unwrap();
}
