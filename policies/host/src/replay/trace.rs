//! Load windows of all layers from a file, and the orders in which their workloads may come. Plans and scores nothing.

use serde::Deserialize;

use super::ReplayError;

/// Windows of one replay: a day of windows of ten seconds.
pub const WINDOWS_MAX: usize = 8640;

/// Workloads whose orders can all be replayed: 5! = 120 replays.
pub const WORKLOADS_MAX: usize = 5;

/// One interval: rows of every expert of every layer.
#[derive(Debug, Clone, PartialEq)]
pub struct Recorded {
    /// Name of the workload that it is of; empty when nobody said.
    pub workload: String,
    /// Tokens that were counted.
    pub tokens: f32,
    /// Rows, [layers, experts].
    pub load: Vec<f32>,
}

/// Windows as they were recorded; at least two, all of one shape.
#[derive(Debug, Clone, PartialEq)]
pub struct Trace {
    /// The model's number of the first layer; the others follow.
    pub first_layer: u32,
    /// Layers of each window.
    pub layers: usize,
    /// Experts of each layer.
    pub experts: usize,
    /// The windows.
    pub windows: Vec<Recorded>,
}

#[derive(Deserialize)]
struct File {
    #[serde(default)]
    first_moe_layer: u32,
    windows: Vec<FileWindow>,
}

#[derive(Deserialize)]
struct FileWindow {
    #[serde(default)]
    task: String,
    tokens: f32,
    logical_count: Vec<Vec<f32>>,
}

impl Trace {
    /// Reads `{"first_moe_layer": .., "windows": [{"task": .., "tokens": .., "logical_count": [layers][experts]}]}`.
    ///
    /// # Errors
    /// Text of another form; windows of several shapes; counts that are none.
    pub fn read(text: &[u8]) -> Result<Self, ReplayError> {
        let file: File = serde_json::from_slice(text)?;
        let (found, max) = (file.windows.len(), WINDOWS_MAX);
        if !(2..=max).contains(&found) {
            return Err(ReplayError::Windows { found, max });
        }
        let layers = file.windows[0].logical_count.len();
        let experts = file.windows[0].logical_count.first().map_or(0, Vec::len);
        let mut windows = Vec::with_capacity(found);
        for (number, window) in file.windows.into_iter().enumerate() {
            let bad = |what: String| Err(ReplayError::Window { number, what });
            let rows = &window.logical_count;
            if rows.len() != layers || layers == 0 {
                return bad(format!("{} layers, expected {}", rows.len(), layers.max(1)));
            }
            if let Some(layer) = rows.iter().position(|row| row.len() != experts || experts == 0) {
                let (found, expected) = (rows[layer].len(), experts.max(1));
                return bad(format!("{found} experts of layer {layer}, expected {expected}"));
            }
            let count = |count: &f32| count.is_finite() && *count >= 0.0;
            let load = window.logical_count.concat();
            let wrong = load.iter().chain([&window.tokens]).find(|value| !count(value));
            if let Some(value) = wrong {
                return bad(format!("a count of {value}, expected a finite number of at least 0"));
            }
            windows.push(Recorded { workload: window.task, tokens: window.tokens, load });
        }
        Ok(Self { first_layer: file.first_moe_layer, layers, experts, windows })
    }

    /// Rows of one layer in one window.
    #[must_use]
    pub fn load(&self, window: usize, layer: usize) -> &[f32] {
        &self.windows[window].load[layer * self.experts..(layer + 1) * self.experts]
    }

    /// The windows in the order of the file.
    #[must_use]
    pub fn as_recorded(&self) -> Vec<usize> {
        (0..self.windows.len()).collect()
    }

    /// The windows of the named workloads, one workload after the other.
    ///
    /// # Errors
    /// [`ReplayError::Workload`] for a name that no window has.
    pub fn ordered(&self, workloads: &[&str]) -> Result<Vec<usize>, ReplayError> {
        let mut order = Vec::new();
        for name in workloads {
            let before = order.len();
            let numbered = self.windows.iter().enumerate();
            order.extend(numbered.filter(|(_, w)| w.workload == *name).map(|(number, _)| number));
            if order.len() == before {
                let known = self.workloads().join(", ");
                return Err(ReplayError::Workload { name: (*name).to_owned(), known });
            }
        }
        Ok(order)
    }

    /// Every order of the workloads, or of some of them.
    ///
    /// # Errors
    /// [`ReplayError::Orders`] when there are too many.
    pub fn orders(&self) -> Result<Vec<Vec<usize>>, ReplayError> {
        let workloads = self.workloads();
        let (found, max) = (workloads.len(), WORKLOADS_MAX);
        if found > max {
            return Err(ReplayError::Orders { found, max });
        }
        permutations(&workloads).iter().map(|order| self.ordered(order)).collect()
    }

    /// Names of workloads, in the order of their first windows.
    #[must_use]
    pub fn workloads(&self) -> Vec<&str> {
        let mut names: Vec<&str> = Vec::new();
        for window in &self.windows {
            if !names.contains(&window.workload.as_str()) {
                names.push(&window.workload);
            }
        }
        names
    }
}

fn permutations<'a>(items: &[&'a str]) -> Vec<Vec<&'a str>> {
    if items.len() <= 1 {
        return vec![items.to_vec()];
    }
    let mut all = Vec::new();
    for (index, first) in items.iter().enumerate() {
        let mut rest = items.to_vec();
        rest.remove(index);
        for mut order in permutations(&rest) {
            order.insert(0, first);
            all.push(order);
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = r#"{"first_moe_layer":1,"windows":[
        {"task":"law","tokens":4,"logical_count":[[3,1],[2,2]]},
        {"task":"books","tokens":4,"logical_count":[[0,4],[2,2]]},
        {"task":"law","tokens":4,"logical_count":[[4,0],[2,2]]}]}"#;

    #[test]
    fn windows_come_in_any_order_of_their_workloads() {
        let trace = Trace::read(TEXT.as_bytes()).unwrap();
        assert_eq!((trace.first_layer, trace.layers, trace.experts), (1, 2, 2));
        assert_eq!(trace.load(1, 0), [0.0, 4.0]);
        assert_eq!(trace.orders().unwrap(), [vec![0, 2, 1], vec![1, 0, 2]]);
        assert_eq!(trace.ordered(&["books"]).unwrap(), [1]);
        let unknown = trace.ordered(&["poems"]).unwrap_err().to_string();
        assert_eq!(unknown, "no window of \"poems\", the file has law, books");
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let refused = |from: &str, to: &str| {
            Trace::read(TEXT.replace(from, to).as_bytes()).unwrap_err().to_string()
        };
        assert_eq!(refused("[[0,4],[2,2]]", "[[0,4]]"), "window 1: 1 layers, expected 2");
        let found = refused("[[0,4],[2,2]]", "[[0,4],[2]]");
        assert_eq!(found, "window 1: 1 experts of layer 1, expected 2");
        let found = refused("[4,0]", "[4,-1]");
        assert_eq!(found, "window 2: a count of -1, expected a finite number of at least 0");
        assert!(refused("windows", "frames").contains("missing field `windows`"));
    }
}
