use super::*;
use crate::rack::Parts;

#[tokio::test]
async fn those_who_look_see_what_the_last_steps_gave() {
    let harness = Harness::start(PATIENCE);
    harness.form(1, prompt);
    // The second prompt has 96 tokens in the cache.
    for _ in 0..2 {
        drain(&mut harness.submit(100, 5).await).await;
    }
    // Rates are of whole seconds, so that both answers show a little later.
    let both = async {
        loop {
            let load = harness.engine.rack().load;
            let expected = load.output_tokens_per_second * 104.0 / 10.0;
            if expected > 0.0 && (load.prompt_tokens_per_second - expected).abs() < 1e-6 {
                return load;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let load = timeout(PATIENCE, both).await.expect("both answers");
    assert_eq!(load.straggler, Some(0));
    assert_eq!(load.ranks.len(), 2);
    for (rank, wait) in [(0, 0), (1, 3)] {
        let parts = load.ranks[rank].parts.unwrap();
        let steps = parts.exchange.as_micros() as u32 / 2;
        let us = |us| Duration::from_micros(us) * steps;
        let expected = Parts {
            compute: us(8 - wait),
            exchange: us(2),
            wait: us(wait),
        };
        assert_eq!(parts, expected);
    }
    let metrics = harness.engine.metrics().render();
    for line in [
        "secondwind_rank_step_seconds_total{rank=\"0\",part=\"wait\"} 0.0",
        "secondwind_rank_straggler_steps_total{rank=\"0\"}",
    ] {
        assert!(metrics.contains(line), "{line}: {metrics}");
    }
}

#[tokio::test]
async fn between_groups_those_who_look_see_who_waits() {
    let mut harness = Harness::start(PATIENCE);
    let events = harness.form(1, |_, _| Box::new(Hangs));
    let mut stream = harness.submit(100, 5).await;
    let queued = stream.recv().await;
    assert!(matches!(queued, Some(SequenceEvent::Queued { .. })));
    let started = stream.recv().await;
    assert!(matches!(started, Some(SequenceEvent::Started { .. })));
    let reason = "rank 1 is gone".to_owned();
    events.send(RankEvent::Lost { rank: 1, reason }).unwrap();
    assert!(harness.ends.recv().await.is_some());
    let counters = harness.engine.rack().counters;
    let standing = (counters.running, counters.waiting, counters.blocks_used);
    assert_eq!(standing, (0, 1, 0));
}
