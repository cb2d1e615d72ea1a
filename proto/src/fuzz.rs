//! What the fuzz target of this crate does with its input; `proto/tests/wire.rs` runs the same over
//! random messages.

use prost::Message;
use secondwind_model::{capabilities::Capabilities, plan::ShardPlan};

use crate::{step_from_wire, step_result_from_wire, step_result_to_wire, step_to_wire, v1};

/// Reads any bytes as each message that crosses the wire. What converts to the model's data converts
/// back to a message that reads the same.
///
/// # Panics
/// When a conversion loses something.
pub fn wire(input: &[u8]) {
    if let Ok(message) = v1::Command::decode(input) {
        match message.command {
            Some(v1::command::Command::Step(step)) => check_step(step),
            Some(v1::command::Command::Form(v1::Form {
                plan: Some(plan), ..
            })) => check_plan(plan),
            _ => {}
        }
    }
    if let Ok(message) = v1::WorkerEvent::decode(input) {
        match message.event {
            Some(v1::worker_event::Event::StepResult(result)) => check_result(result),
            Some(v1::worker_event::Event::Join(v1::Join {
                capabilities: Some(capabilities),
                ..
            })) => check_capabilities(capabilities),
            _ => {}
        }
    }
    if let Ok(step) = v1::Step::decode(input) {
        check_step(step);
    }
    if let Ok(plan) = v1::Plan::decode(input) {
        check_plan(plan);
    }
    if let Ok(result) = v1::StepResult::decode(input) {
        check_result(result);
    }
    if let Ok(capabilities) = v1::Capabilities::decode(input) {
        check_capabilities(capabilities);
    }
}

fn check_step(message: v1::Step) {
    let epoch = message.epoch;
    if let Ok(step) = step_from_wire(message) {
        let again = step_to_wire(epoch, &step);
        // Compared as bytes: a NaN is not equal to itself.
        let bytes = again.encode_to_vec();
        let twice = step_from_wire(again).map(|step| step_to_wire(epoch, &step).encode_to_vec());
        assert_eq!(twice, Ok(bytes));
    }
}

fn check_plan(message: v1::Plan) {
    if let Ok(plan) = ShardPlan::try_from(message) {
        let again = v1::Plan::from(&plan);
        let bytes = again.encode_to_vec();
        let twice = ShardPlan::try_from(again).map(|plan| v1::Plan::from(&plan).encode_to_vec());
        assert_eq!(twice, Ok(bytes));
    }
}

fn check_result(message: v1::StepResult) {
    let epoch = message.epoch;
    if let Ok(result) = step_result_from_wire(message) {
        let again = step_result_to_wire(epoch, result);
        let bytes = again.encode_to_vec();
        let twice = step_result_from_wire(again)
            .map(|result| step_result_to_wire(epoch, result).encode_to_vec());
        assert_eq!(twice, Ok(bytes));
    }
}

fn check_capabilities(message: v1::Capabilities) {
    if let Ok(capabilities) = Capabilities::try_from(message) {
        let again = v1::Capabilities::from(&capabilities);
        assert_eq!(Capabilities::try_from(again), Ok(capabilities));
    }
}
