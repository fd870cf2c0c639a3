//! A check that the harness's own work continues: a ticker and a signal on its thread.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::runtime::{Builder, Runtime};

const TICK: Duration = Duration::from_millis(100);
/// The maximum delay of the ticker.
const LATE: Duration = Duration::from_millis(100);
/// The maximum time until a signal is received.
const HEARD: Duration = Duration::from_secs(1);

/// Creates the runtime of agents, upstreams and the gateway. The harness's own work does not run here.
pub(crate) fn outside() -> Runtime {
    Builder::new_multi_thread().worker_threads(2).thread_stack_size(16 << 20).enable_all().build().unwrap()
}

/// Creates the single-threaded runtime that a harness's process has for its own work.
pub(crate) fn inside() -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

/// The longest delay so far, in microseconds.
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

/// A ticker and a repeated signal beside the harness's own work. A thread that does nothing else measures the machine's own delay.
pub(crate) struct Watched {
    ticks: Worst,
    signals: Worst,
    machine: Worst,
    over: Arc<AtomicBool>,
}

impl Watched {
    /// Starts the measurement. Must be called in the runtime of the harness's own work.
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
        let (raised, mut was_raised) = tokio::sync::mpsc::channel(64);
        std::thread::spawn(move || {
            while !over.load(Ordering::Relaxed) {
                let _ = raised.try_send(Instant::now());
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

    /// Asserts that the delays are within their limits. The machine itself may be slow, because other tests run beside this one.
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
