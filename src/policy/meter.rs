//! Bounds the steps, the memory and the time of one evaluation.
//!
//! Expressions and schemas are written by tenants, and they are evaluated on input from agents.
//!
//! Guarantees: every evaluator counts each step here, and gets an error once the allowance is used up. From then on every further step is
//! an error as well, so an evaluation ends soon, even if it recovers from errors. The caller learns that the evaluation did not end by
//! itself. An evaluation without an allowance of its own has the default one.
//! Non-goals: interrupting a single step. The time of a step is linear in values whose length is bounded elsewhere.
//!
//! The allowance belongs to the thread: an evaluation runs on one thread from start to end.

use std::{
    cell::{Cell, RefCell},
    fmt,
    rc::Rc,
    time::{Duration, Instant},
};

/// The maximum cost of an evaluation.
#[derive(Clone, Copy, Debug)]
pub struct Allowance {
    /// Steps. An element of a loop, an operator, or a part of a value that a schema is applied to is a step.
    pub steps: u64,
    /// Bytes of lists and texts that the evaluation makes.
    pub bytes: u64,
    /// Time.
    pub time: Duration,
}

impl Allowance {
    /// The allowance for the evaluation of a call.
    pub const CALL: Self = Self { steps: 4_000_000, bytes: 16 << 20, time: Duration::from_secs(5) };
    /// The allowance for an evaluation while others wait, because it runs while records are put in order.
    pub const IN_ORDER: Self = Self { steps: 20_000, bytes: 1 << 20, time: Duration::from_millis(50) };

    /// Returns the same allowance with at most this time.
    pub fn within(self, time: Duration) -> Self {
        Self { time: self.time.min(time), ..self }
    }
}

/// The part of an allowance that is used up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exceeded {
    /// The steps.
    Steps(u64),
    /// The bytes.
    Bytes(u64),
    /// The time.
    Time(Duration),
}

impl fmt::Display for Exceeded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Steps(steps) => write!(f, "it takes more than {steps} steps over these values"),
            Self::Bytes(bytes) => write!(f, "it makes more than {bytes} bytes of lists and texts of these values"),
            Self::Time(time) => write!(f, "it takes more than {time:?} over these values"),
        }
    }
}

struct Meter {
    given: Allowance,
    until: Instant,
    steps: Cell<u64>,
    bytes: Cell<u64>,
    exceeded: Cell<Option<Exceeded>>,
}

thread_local! {
    static METER: RefCell<Option<Rc<Meter>>> = const { RefCell::new(None) };
}

/// Restores the previous meter when it is dropped, whatever happens.
struct Before(Option<Rc<Meter>>);

impl Drop for Before {
    fn drop(&mut self) {
        let before = self.0.take();
        METER.with(|meter| *meter.borrow_mut() = before);
    }
}

/// Runs an evaluation with an allowance of its own.
pub fn within<T>(given: Allowance, judge: impl FnOnce() -> T) -> T {
    let now = Instant::now();
    let meter = Meter {
        given,
        until: now.checked_add(given.time).unwrap_or(now),
        steps: Cell::new(given.steps),
        bytes: Cell::new(given.bytes),
        exceeded: Cell::new(None),
    };
    let _before = Before(METER.with(|current| current.borrow_mut().replace(Rc::new(meter))));
    judge()
}

/// Runs an evaluation with the current allowance, or with [`Allowance::CALL`] if there is none.
pub fn metered<T>(judge: impl FnOnce() -> T) -> T {
    let is_metered = METER.with(|meter| meter.borrow().is_some());
    if is_metered { judge() } else { within(Allowance::CALL, judge) }
}

/// Counts steps.
///
/// # Errors
/// Returns an error once the allowance is used up.
pub fn step(count: u64) -> Result<(), Exceeded> {
    current(|meter| {
        let Some(left) = meter.steps.get().checked_sub(count) else {
            return Err(Exceeded::Steps(meter.given.steps));
        };
        meter.steps.set(left);
        // Reading the clock takes no longer than the rest of a step.
        if Instant::now() > meter.until { Err(Exceeded::Time(meter.given.time)) } else { Ok(()) }
    })
}

/// Counts the bytes of a value that the evaluation makes.
///
/// # Errors
/// Returns an error once the allowance is used up.
pub fn make(bytes: u64) -> Result<(), Exceeded> {
    current(|meter| {
        let left = meter.bytes.get().checked_sub(bytes).ok_or(Exceeded::Bytes(meter.given.bytes))?;
        meter.bytes.set(left);
        Ok(())
    })
}

/// Checks whether the evaluation stayed within its allowance. If it did not, its result does not count.
///
/// # Errors
/// Returns the part of the allowance that was used up.
pub fn ended_by_itself() -> Result<(), Exceeded> {
    current(|_| Ok(()))
}

fn current(count: impl FnOnce(&Meter) -> Result<(), Exceeded>) -> Result<(), Exceeded> {
    METER.with(|meter| {
        let Some(meter) = &*meter.borrow() else { return Ok(()) };
        if let Some(exceeded) = meter.exceeded.get() {
            return Err(exceeded);
        }
        count(meter).inspect_err(|exceeded| meter.exceeded.set(Some(*exceeded)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const FEW: Allowance = Allowance { steps: 3, bytes: 10, time: Duration::from_secs(60) };

    #[test]
    fn what_is_used_up_stays_so() {
        within(FEW, || {
            assert_eq!((step(3), ended_by_itself()), (Ok(()), Ok(())));
            assert_eq!(step(1), Err(Exceeded::Steps(3)));
            assert_eq!(
                (step(0), make(0), ended_by_itself()),
                (Err(Exceeded::Steps(3)), Err(Exceeded::Steps(3)), Err(Exceeded::Steps(3)))
            );
        });
        within(FEW, || assert_eq!((make(10), make(1)), (Ok(()), Err(Exceeded::Bytes(10)))));
        let no_time = Allowance { time: Duration::ZERO, ..FEW };
        within(no_time, || {
            std::thread::sleep(Duration::from_millis(1));
            assert_eq!(step(1), Err(Exceeded::Time(Duration::ZERO)));
        });
    }

    #[test]
    fn each_judgment_has_its_own_and_gives_it_back() {
        within(FEW, || {
            assert_eq!(step(3), Ok(()));
            within(FEW, || assert_eq!(step(3), Ok(())));
            metered(|| assert!(step(1).is_err(), "the judgment that there is"));
        });
        assert!(std::panic::catch_unwind(|| within(FEW, || panic!("while judging"))).is_err());
        assert_eq!(step(u64::MAX), Ok(()), "nothing is metered outside");
        metered(|| assert_eq!(step(Allowance::CALL.steps + 1), Err(Exceeded::Steps(Allowance::CALL.steps))));
    }
}
