//! A step's parts as a tree. Pure.

use std::collections::BTreeMap;

use secondwind_worker::{
    backend::LinearUse,
    timeline::{Mark, Span},
};
use serde::Serialize;

use crate::{output, ranks::median};

/// A group of parts, or one.
#[derive(Debug, Serialize)]
pub struct Node {
    /// What it is.
    pub name: String,
    /// On the device's clock, all layers together.
    pub seconds: f64,
    /// Of the whole step.
    pub share: f64,
    /// Where several layers have it.
    pub per_layer: Option<PerLayer>,
    /// Where it is a product with weights.
    pub linear: Option<Linear>,
    /// Its parts, in their order.
    pub children: Vec<Node>,
}

/// Seconds of a layer.
#[derive(Debug, Serialize)]
pub struct PerLayer {
    /// Of the fastest.
    pub min_seconds: f64,
    /// Of the middle one.
    pub median_seconds: f64,
    /// Of the slowest.
    pub max_seconds: f64,
}

/// What runs a product.
#[derive(Debug, Serialize)]
pub struct Linear {
    /// The selector's choice, or choices.
    pub path: String,
    /// Of the activations.
    pub rows: usize,
    /// Weights, scales and zero points, each once.
    pub read_bytes: u64,
    /// These over the time.
    pub bytes_per_second: f64,
}

/// A node that still grows.
#[derive(Default)]
struct Growing<'a> {
    name: String,
    by_layer: BTreeMap<Option<usize>, f64>,
    linears: Vec<&'a LinearUse>,
    children: Vec<Growing<'a>>,
}

/// The tree of a step's spans; layers are added up, or stand for themselves if `each_layer`.
pub fn tree(spans: &[Span], linears: &[(Mark, LinearUse)], each_layer: bool) -> Node {
    let mut root = Growing {
        name: "step".into(),
        ..Growing::default()
    };
    for span in spans {
        let mut node = &mut root;
        node.add(span);
        for name in place(span.mark, each_layer) {
            node = node.child(name);
            node.add(span);
        }
        let own = linears.iter().filter(|(mark, _)| *mark == span.mark);
        node.linears.extend(own.map(|(_, linear)| linear));
    }
    let total = root.seconds();
    root.finish(total)
}

/// Names from the outermost group to the part itself.
fn place(mark: Mark, each_layer: bool) -> Vec<String> {
    let mut names: Vec<String> = mark
        .part
        .place()
        .iter()
        .map(|&name| name.to_owned())
        .collect();
    if let (Some(layer), true) = (mark.layer, each_layer) {
        names.insert(1, format!("layer {layer}"));
    }
    names
}

impl<'a> Growing<'a> {
    fn add(&mut self, span: &Span) {
        *self.by_layer.entry(span.mark.layer).or_default() += span.seconds;
    }

    fn child(&mut self, name: String) -> &mut Growing<'a> {
        let known = self.children.iter().position(|child| child.name == name);
        let index = known.unwrap_or_else(|| {
            self.children.push(Growing {
                name,
                ..Growing::default()
            });
            self.children.len() - 1
        });
        &mut self.children[index]
    }

    fn seconds(&self) -> f64 {
        self.by_layer.values().sum()
    }

    fn finish(self, total: f64) -> Node {
        let seconds = self.seconds();
        let of_layers = self.by_layer.keys().all(Option::is_some) && self.by_layer.len() > 1;
        Node {
            seconds,
            share: if total > 0.0 { seconds / total } else { 0.0 },
            per_layer: of_layers.then(|| PerLayer {
                min_seconds: self.by_layer.values().copied().fold(f64::MAX, f64::min),
                median_seconds: median(self.by_layer.values().copied().collect()),
                max_seconds: self.by_layer.values().copied().fold(0.0, f64::max),
            }),
            linear: linear(&self.linears, seconds),
            name: self.name,
            children: self
                .children
                .into_iter()
                .map(|child| child.finish(total))
                .collect(),
        }
    }
}

fn linear(uses: &[&LinearUse], seconds: f64) -> Option<Linear> {
    let first = uses.first()?;
    let mut paths: Vec<&str> = Vec::new();
    for one in uses {
        if !paths.contains(&one.path.name()) {
            paths.push(one.path.name());
        }
    }
    let read_bytes = uses.iter().map(|one| one.read_bytes).sum();
    Some(Linear {
        path: paths.join(" + "),
        rows: first.rows,
        read_bytes,
        bytes_per_second: match seconds > 0.0 {
            true => read_bytes as f64 / seconds,
            false => 0.0,
        },
    })
}

/// The tree as a table, a line for each node.
pub fn render(root: &Node) -> String {
    let mut rows = Vec::new();
    lines(root, 0, &mut rows);
    let header = [
        "part", "ms", "share", "layer us", "min", "max", "GB/s", "rows", "path",
    ];
    output::table(&header, &rows, &[1, 2, 3, 4, 5, 6, 7])
}

fn lines(node: &Node, depth: usize, rows: &mut Vec<Vec<String>>) {
    let micros = |seconds: f64| format!("{:.1}", 1e6 * seconds);
    let of_layer = |of: fn(&PerLayer) -> f64| {
        let layer = node.per_layer.as_ref();
        layer.map_or_else(String::new, |layer| micros(of(layer)))
    };
    let of_linear = |of: fn(&Linear) -> String| node.linear.as_ref().map_or_else(String::new, of);
    rows.push(vec![
        format!("{}{}", "  ".repeat(depth), node.name),
        format!("{:.3}", 1e3 * node.seconds),
        format!("{:.1} %", 100.0 * node.share),
        of_layer(|layer| layer.median_seconds),
        of_layer(|layer| layer.min_seconds),
        of_layer(|layer| layer.max_seconds),
        of_linear(|linear| format!("{:.1}", linear.bytes_per_second / 1e9)),
        of_linear(|linear| linear.rows.to_string()),
        of_linear(|linear| linear.path.clone()),
    ]);
    for child in &node.children {
        lines(child, depth + 1, rows);
    }
}

#[cfg(test)]
mod tests {
    use secondwind_kernels::select::LinearPath;
    use secondwind_worker::timeline::Part;

    use super::*;

    fn span(layer: Option<usize>, part: Part, seconds: f64) -> Span {
        Span {
            mark: Mark { layer, part },
            seconds,
        }
    }

    fn spans() -> Vec<Span> {
        let mut spans = vec![span(None, Part::Embed, 1.0)];
        for layer in 0..3 {
            let more = layer as f64;
            spans.push(span(Some(layer), Part::Qkv, 2.0 + more));
            spans.push(span(Some(layer), Part::Output, 1.0));
            spans.push(span(Some(layer), Part::Down, 4.0));
        }
        spans.push(span(None, Part::LmHead, 6.0));
        spans
    }

    fn find<'a>(node: &'a Node, path: &[&str]) -> &'a Node {
        path.iter().fold(node, |node, name| {
            let child = node.children.iter().find(|child| child.name == *name);
            child.unwrap_or_else(|| panic!("{} has no {name}", node.name))
        })
    }

    #[test]
    fn parts_add_up_and_layers_are_compared() {
        let tree = tree(&spans(), &[], false);
        assert_eq!(tree.seconds, 31.0);
        let names: Vec<&str> = tree.children.iter().map(|child| &*child.name).collect();
        assert_eq!(names, ["embedding", "layers", "lm_head"]);
        assert!(tree.per_layer.is_none());
        let layers = find(&tree, &["layers"]);
        assert_eq!((layers.seconds, layers.share), (24.0, 24.0 / 31.0));
        let attention = find(&tree, &["layers", "attention"]);
        let layer = attention.per_layer.as_ref().unwrap();
        let found = (layer.min_seconds, layer.median_seconds, layer.max_seconds);
        assert_eq!(found, (3.0, 4.0, 5.0));
        assert_eq!(find(&tree, &["layers", "mlp", "down"]).seconds, 12.0);
        // Every level adds up to the one above.
        fn check(node: &Node) {
            if !node.children.is_empty() {
                let sum: f64 = node.children.iter().map(|child| child.seconds).sum();
                assert!((sum - node.seconds).abs() < 1e-9, "{}", node.name);
            }
            node.children.iter().for_each(check);
        }
        check(&tree);
    }

    #[test]
    fn layers_may_stand_for_themselves() {
        let tree = tree(&spans(), &[], true);
        let names: Vec<&str> = find(&tree, &["layers"])
            .children
            .iter()
            .map(|child| &*child.name)
            .collect();
        assert_eq!(names, ["layer 0", "layer 1", "layer 2"]);
        assert_eq!(
            find(&tree, &["layers", "layer 2", "attention", "qkv"]).seconds,
            4.0
        );
    }

    #[test]
    fn products_say_what_they_read() {
        let one = |path, read_bytes| LinearUse {
            path,
            rows: 3,
            read_bytes,
            multiply_adds: 0,
        };
        let mark = |layer| Mark {
            layer: Some(layer),
            part: Part::Qkv,
        };
        let linears = [
            (mark(0), one(LinearPath::CpuAvx2, 10)),
            (mark(0), one(LinearPath::CpuAvx2, 5)),
            (mark(1), one(LinearPath::CpuPortable, 3)),
        ];
        let tree = tree(&spans(), &linears, false);
        let qkv = find(&tree, &["layers", "attention", "qkv"])
            .linear
            .as_ref()
            .unwrap();
        assert_eq!((qkv.read_bytes, qkv.rows), (18, 3));
        assert_eq!(qkv.path, "cpu_avx2 + cpu_portable");
        assert_eq!(qkv.bytes_per_second, 2.0);
        assert!(find(&tree, &["lm_head", "linear"]).linear.is_none());
    }
}
