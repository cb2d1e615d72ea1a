use std::time::Duration;

use tonic::Code;

use super::{generate, says, serve, text_request, token};
use crate::request::{SequenceEvent, SubmitError};

#[tokio::test]
async fn failures_of_the_step_loop_become_statuses() {
    let internal = SubmitError::Internal {
        detail: "rank 1 is on fire".to_owned(),
    };
    let cases = [
        (
            SubmitError::QueueFull {
                limit: 9,
                retry_after: Duration::from_secs(4),
            },
            Code::ResourceExhausted,
            "the queue is full: 9 sequences are waiting; try again in 4 s",
        ),
        (
            SubmitError::NoGroup {
                detail: "1 of 2 workers have joined".to_owned(),
            },
            Code::Unavailable,
            "no group is serving yet: 1 of 2 workers have joined",
        ),
        (
            SubmitError::Draining,
            Code::Unavailable,
            "the coordinator is shutting down",
        ),
        (
            SubmitError::WorkerLost {
                detail: "secret".to_owned(),
            },
            Code::Unavailable,
            "a worker was lost",
        ),
        (
            SubmitError::DeadlineExceeded,
            Code::DeadlineExceeded,
            "the deadline has passed",
        ),
        (
            SubmitError::KvCacheTooSmall {
                needed_tokens: 64,
                capacity_tokens: 32,
            },
            Code::FailedPrecondition,
            "the sequence may grow to 64 tokens, but the KV cache of the group holds 32; ask for fewer max_tokens",
        ),
        (internal, Code::Internal, "internal error"),
    ];
    for (error, code, message) in cases {
        let at_once = error.clone();
        let served = serve(move |_, _| Err(at_once.clone())).await;
        let answer = generate(&served, text_request("hello")).await;
        let status = answer.error.unwrap();
        assert_eq!((status.code(), status.message()), (code, message));

        let served = serve(says(vec![token(259), SequenceEvent::Failed(error)])).await;
        let answer = generate(&served, text_request("hello")).await;
        let status = answer.error.unwrap();
        assert_eq!((status.code(), status.message()), (code, message));
        assert_eq!(answer.text, "hello");
    }
    // A step loop that ends without a word.
    let served = serve(|_, sender| {
        let _ = sender.send(token(259));
        Ok(())
    })
    .await;
    let answer = generate(&served, text_request("hello")).await;
    assert_eq!(answer.error.unwrap().code(), Code::Internal);
}
