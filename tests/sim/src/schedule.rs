//! One thread at a time: who goes on at every point where another might is drawn from a seed, and time passes only while
//! nobody can go on. Threads run the real code; that they are threads is only how it may stop in the midst of a function.

use std::panic::resume_unwind;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tests::random::Random;
use xxhash_rust::xxh3::Xxh3;

/// The place of the thread that decides what goes wrong.
pub(crate) const DIRECTOR: usize = 0;

/// At one of so many points another goes on.
const PASSES: usize = 6;

/// With which a thread unwinds whose process was killed.
#[derive(Debug)]
pub(crate) struct Killed;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Nobody is there.
    Out,
    Ready,
    AsleepUntil(Duration),
}

#[derive(Debug, Clone, Copy)]
struct Place {
    state: State,
    killed: bool,
}

struct Inner {
    random: Random,
    now: Duration,
    places: Vec<Place>,
    turn: usize,
    trace: Xxh3,
}

/// Places that take turns.
pub(crate) struct Schedule {
    inner: Mutex<Inner>,
    turns: Vec<Condvar>,
}

impl Schedule {
    /// So many places beside the director's, whose turn it is.
    pub(crate) fn new(seed: u64, places: usize) -> Self {
        let mut all = vec![Place { state: State::Out, killed: false }; places + 1];
        all[DIRECTOR].state = State::Ready;
        let random = Random::new(seed);
        let (now, trace) = (Duration::ZERO, Xxh3::new());
        let inner = Mutex::new(Inner { random, now, places: all, turn: DIRECTOR, trace });
        Self { inner, turns: (0..=places).map(|_| Condvar::new()).collect() }
    }

    /// The time.
    pub(crate) fn now(&self) -> Duration {
        self.lock().now
    }

    /// A number below `end` of this seed.
    pub(crate) fn below(&self, end: usize) -> usize {
        self.lock().random.below(end)
    }

    /// Makes a word part of the trace.
    pub(crate) fn note(&self, word: &str) {
        let mut inner = self.lock();
        let now = inner.now;
        inner.trace.update(&now.as_nanos().to_le_bytes());
        inner.trace.update(word.as_bytes());
    }

    /// What everything that happened comes to.
    pub(crate) fn trace(&self) -> u64 {
        self.lock().trace.digest()
    }

    /// Another may go on here.
    pub(crate) fn pass(&self, place: usize) {
        let mut inner = self.lock();
        if inner.random.below(PASSES) == 0 {
            self.hand_over(inner, place);
        }
    }

    /// Sleeps so long, unless it is woken.
    pub(crate) fn sleep(&self, place: usize, time: Duration) {
        let mut inner = self.lock();
        let until = inner.now + time.max(Duration::from_micros(1));
        inner.places[place].state = State::AsleepUntil(until);
        self.hand_over(inner, place);
    }

    /// Ends a sleep.
    pub(crate) fn wake(&self, place: usize) {
        let mut inner = self.lock();
        if let State::AsleepUntil(_) = inner.places[place].state {
            inner.places[place].state = State::Ready;
        }
    }

    /// Has whoever is at a place end where it is.
    pub(crate) fn kill(&self, place: usize) {
        let mut inner = self.lock();
        if inner.places[place].state != State::Out {
            inner.places[place] = Place { state: State::Ready, killed: true };
        }
    }

    /// Whether nobody is at a place.
    pub(crate) fn is_free(&self, place: usize) -> bool {
        self.lock().places[place].state == State::Out
    }

    /// Somebody is about to come to a place.
    pub(crate) fn take(&self, place: usize) {
        self.lock().places[place] = Place { state: State::Ready, killed: false };
    }

    /// A thread waits for its first turn at its place.
    pub(crate) fn begin(&self, place: usize) {
        let inner = self.turn(self.lock(), place);
        Self::end_if_killed(inner, place);
    }

    /// A thread ends.
    pub(crate) fn leave(&self, place: usize) {
        let mut inner = self.lock();
        inner.places[place].state = State::Out;
        self.give(&mut inner);
    }

    /// Gives the turn away, and waits until it comes back.
    fn hand_over(&self, mut inner: MutexGuard<'_, Inner>, place: usize) {
        self.give(&mut inner);
        let mut inner = self.turn(inner, place);
        inner.places[place].state = State::Ready;
        Self::end_if_killed(inner, place);
    }

    fn end_if_killed(mut inner: MutexGuard<'_, Inner>, place: usize) {
        let killed = std::mem::take(&mut inner.places[place].killed);
        drop(inner);
        if killed {
            resume_unwind(Box::new(Killed));
        }
    }

    /// Draws whose turn it is, of those that can go on, or of those that can first.
    fn give(&self, inner: &mut Inner) {
        let due = |now: Duration| {
            move |place: &Place| match place.state {
                State::Out => false,
                State::Ready => true,
                State::AsleepUntil(until) => until <= now,
            }
        };
        if !inner.places.iter().any(due(inner.now)) {
            let first = inner.places.iter().filter_map(|place| match place.state {
                State::AsleepUntil(until) => Some(until),
                _ => None,
            });
            inner.now = first.min().unwrap_or(inner.now);
        }
        let numbered = inner.places.iter().enumerate();
        let now = due(inner.now);
        let can: Vec<usize> =
            numbered.filter(|(_, place)| now(place)).map(|(number, _)| number).collect();
        let drawn = inner.random.below(can.len().max(1));
        inner.turn = can.get(drawn).copied().unwrap_or(DIRECTOR);
        inner.trace.update(&inner.turn.to_le_bytes());
        self.turns[inner.turn].notify_one();
    }

    fn turn<'a>(&'a self, inner: MutexGuard<'a, Inner>, place: usize) -> MutexGuard<'a, Inner> {
        let waited = self.turns[place].wait_while(inner, |inner| inner.turn != place);
        waited.unwrap_or_else(PoisonError::into_inner)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
