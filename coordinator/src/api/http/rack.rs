//! `GET /rack`: how things stand, for people who look and programs that show it to them.

use axum::extract::State as Shared;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::Response;
use secondwind_proto::v1;
use serde_json::{Value as Json, json};

use super::super::frontend::ServedModel;
use super::{Api, error};
use crate::cluster::State;
use crate::rack::{Load, Rack, RankLoad, WINDOW_SECONDS};
use crate::request::Engine;

pub(super) async fn show<E: Engine>(Shared(server): Api<E>) -> Response {
    let json = json(&server.frontend.rack(), server.frontend.model());
    let mut response = error::json_response(StatusCode::OK, &json);
    let fresh = HeaderValue::from_static("no-store");
    response.headers_mut().insert(header::CACHE_CONTROL, fresh);
    response
}

fn json(rack: &Rack, model: &ServedModel) -> Json {
    let (state, group) = match &rack.state {
        State::Gathering { .. } => ("gathering", None),
        State::NoPlan { .. } => ("no_plan", None),
        State::Loading { .. } => ("loading", None),
        State::Serving(group) => ("serving", Some(group)),
    };
    let counters = &rack.counters;
    json!({
        "state": state,
        // A sentence: when nothing serves, why.
        "detail": rack.state.to_string(),
        "version": env!("CARGO_PKG_VERSION"),
        "model": {
            "id": model.name,
            "architecture": model.architecture,
            "max_context_tokens": model.max_context_tokens,
            "chat": model.text.has_chat_template() && model.text.chat_template_error().is_none(),
            "takes_enable_thinking": model.text.takes_thinking(),
        },
        "sequences": {"running": counters.running, "waiting": counters.waiting},
        "kv_blocks": {
            "used": counters.blocks_used,
            "cached": counters.blocks_cached,
            "total": counters.blocks_total,
        },
        "load": {
            "window_seconds": WINDOW_SECONDS,
            "steps_per_second": rack.load.steps_per_second,
            "prompt_tokens_per_second": rack.load.prompt_tokens_per_second,
            "output_tokens_per_second": rack.load.output_tokens_per_second,
            "straggler": rack.load.straggler,
        },
        "group": group.map(|group| group_json(group, &rack.load)),
    })
}

fn group_json(group: &v1::Group, load: &Load) -> Json {
    let ranks = group.ranks.iter().enumerate().map(|(index, rank)| {
        json!({
            "rank": rank.rank,
            "worker": rank.worker,
            "device": rank.device,
            "query_heads": rank.query_heads,
            "ffn": rank.ffn,
            "vocab": rank.vocab,
            "planned_bytes": rank.planned_bytes,
            "resident_bytes": rank.resident_bytes,
            "choices": rank.choices,
            "time": load.ranks.get(index).map(time),
        })
    });
    json!({
        "epoch": group.epoch,
        "kv_dtype": group.kv_dtype,
        "block_tokens": group.block_tokens,
        "max_sequences": group.max_sequences,
        "ranks": ranks.collect::<Vec<_>>(),
    })
}

/// Shares: of the window that the rank was at steps, and of that time in each part, where that is known.
fn time(load: &RankLoad) -> Json {
    let mut json = json!({"busy": load.busy});
    if let Some(parts) = &load.parts {
        let total = parts.total().as_secs_f64();
        for (name, part) in [
            ("compute", parts.compute),
            ("exchange", parts.exchange),
            ("wait", parts.wait),
        ] {
            // Steps that took no microsecond have no parts to speak of.
            let share = part.as_secs_f64() / total;
            json[name] = if share.is_finite() {
                share.into()
            } else {
                0.0.into()
            };
        }
    }
    json
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::rack::Parts;

    fn load(parts: Option<Parts>) -> RankLoad {
        RankLoad { busy: 0.5, parts }
    }

    #[test]
    fn a_rank_has_the_shares_of_its_time_that_are_known() {
        let parts = Parts {
            compute: Duration::from_secs(3),
            exchange: Duration::from_secs(1),
            wait: Duration::ZERO,
        };
        let shares = json!({"busy": 0.5, "compute": 0.75, "exchange": 0.25, "wait": 0.0});
        assert_eq!(time(&load(Some(parts))), shares);
        assert_eq!(time(&load(None)), json!({"busy": 0.5}));
        let nothing = json!({"busy": 0.5, "compute": 0.0, "exchange": 0.0, "wait": 0.0});
        assert_eq!(time(&load(Some(Parts::default()))), nothing);
    }

    #[test]
    fn ranks_that_had_no_steps_have_no_time() {
        let rank = |rank, worker: &str| v1::GroupRank {
            rank,
            worker: worker.to_owned(),
            query_heads: "0..3".to_owned(),
            ..v1::GroupRank::default()
        };
        let group = v1::Group {
            epoch: 2,
            ranks: vec![rank(0, "a"), rank(1, "b")],
            ..v1::Group::default()
        };
        let load = Load {
            ranks: vec![load(None)],
            ..Load::default()
        };
        let told = group_json(&group, &load);
        assert_eq!(told["ranks"][0]["time"], json!({"busy": 0.5}));
        assert_eq!(told["ranks"][1]["time"], Json::Null);
        assert_eq!(told["ranks"][1]["worker"], "b");
        assert_eq!(told["ranks"][1]["query_heads"], "0..3");
    }
}
