use clap::Parser;

use super::*;

#[derive(Parser)]
struct Line {
    #[command(flatten)]
    flags: ScheduleFlags,
}

fn office(flags: &[&str]) -> Report {
    let line = Line::parse_from(["schedule"].iter().chain(flags));
    measure(&line.flags, trace::parse(OFFICE).unwrap()).unwrap()
}

#[test]
fn the_office_is_served_alike_every_time() {
    let (once, again) = (office(&[]), office(&[]));
    let text = |report: &Report| serde_json::to_string(report).unwrap();
    assert_eq!(text(&once), text(&again));
    assert_eq!((once.requests > 100, once.refused), (true, 0));
    assert!(render(&once).contains("tenant"));
}

#[test]
fn the_cache_saves_prompts_and_the_limit_keeps_gaps_short() {
    let with = office(&[]);
    let without = office(&["--prefix-cache", "off"]);
    assert_eq!(without.cached_prompt_share, 0.0);
    assert!(with.cached_prompt_share > 0.3);
    assert!(with.first_token_seconds.p90 < without.first_token_seconds.p90);
    let whole = office(&["--max-prefill-tokens", "512"]);
    assert!(with.between_tokens_seconds.p99 < 0.4 * whole.between_tokens_seconds.p99);
    assert!(with.output_tokens_per_second > 0.95 * whole.output_tokens_per_second);
}

#[test]
fn the_batch_job_does_not_crowd_out_people() {
    let report = office(&["--rate", "3"]);
    let first = |tenant: usize| report.tenants[tenant].first_token_seconds.p50;
    assert!(first(0) < 0.1 * first(2), "{:?}", report.tenants);
    assert!(
        report.fairness.is_some_and(|index| index > 0.95),
        "{report:?}"
    );
}

#[test]
fn figures_are_what_they_are_called() {
    let work = |values: &[usize]| (0..).zip(values.iter().copied()).collect();
    assert_eq!(jain(&work(&[5, 5])), Some(1.0));
    assert_eq!(jain(&work(&[5, 0])), Some(0.5));
    assert_eq!(jain(&work(&[5])), None);
}
