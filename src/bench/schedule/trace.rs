//! Traces of requests: our own lines, and the CSV files of Azure's public LLM inference traces
//! (github.com/Azure/AzurePublicDataset), which know no tenants and no conversations.

use secondwind_coordinator::scheduler::replay::Arrival;

/// First line of Azure's files.
const AZURE_HEADER: &str = "TIMESTAMP,ContextTokens,GeneratedTokens";
/// Tokens of a prompt or an answer.
const MOST_TOKENS: usize = 1 << 20;
/// Lines of a trace.
const MOST_REQUESTS: usize = 1 << 20;

/// Reads a trace; its requests in order of time, the first at 0.
pub fn parse(text: &str) -> Result<Vec<Arrival>, String> {
    let azure = text
        .lines()
        .next()
        .is_some_and(|line| line.trim() == AZURE_HEADER);
    let mut arrivals = Vec::new();
    for (index, line) in text.lines().enumerate().skip(usize::from(azure)) {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if arrivals.len() == MOST_REQUESTS {
            return Err(format!("more than {MOST_REQUESTS} requests"));
        }
        let parsed = if azure {
            azure_line(line)
        } else {
            own_line(line)
        };
        arrivals.push(parsed.map_err(|why| format!("line {}: {why}", index + 1))?);
    }
    if arrivals.is_empty() {
        return Err("no requests".into());
    }
    arrivals.sort_by(|a: &Arrival, b| a.at.total_cmp(&b.at));
    let start = arrivals[0].at;
    for arrival in &mut arrivals {
        arrival.at -= start;
    }
    Ok(arrivals)
}

/// `seconds tenant priority conversation shared_tokens prompt_tokens output_tokens`
fn own_line(line: &str) -> Result<Arrival, String> {
    let fields: Vec<&str> = line.split_whitespace().collect();
    let [at, tenant, priority, conversation, shared, prompt, output] = fields[..] else {
        return Err(format!("{} fields where 7 are due", fields.len()));
    };
    Ok(Arrival {
        at: seconds(at)?,
        tenant: tenant.parse().map_err(|_| wrong("tenant", tenant))?,
        priority: priority.parse().map_err(|_| wrong("priority", priority))?,
        conversation: number("conversation", conversation)? as u64,
        shared_tokens: number("shared_tokens", shared)?,
        prompt_tokens: tokens("prompt_tokens", prompt)?,
        output_tokens: tokens("output_tokens", output)?,
    })
}

/// `2023-11-16 18:15:46.6805900,374,44`: the day counts within its month.
fn azure_line(line: &str) -> Result<Arrival, String> {
    let fields: Vec<&str> = line.split(',').collect();
    let [time, prompt, output] = fields[..] else {
        return Err(format!("{} fields where 3 are due", fields.len()));
    };
    let (date, clock) = time
        .split_once(' ')
        .ok_or_else(|| wrong("TIMESTAMP", time))?;
    let day = date.rsplit('-').next().unwrap_or_default();
    // Later files have a time zone.
    let clock = clock.split('+').next().unwrap_or_default();
    let parts: Vec<&str> = clock.split(':').collect();
    let [hour, minute, second] = parts[..] else {
        return Err(wrong("TIMESTAMP", time));
    };
    let mut at = 0.0;
    for (text, unit) in [
        (day, 86400.0),
        (hour, 3600.0),
        (minute, 60.0),
        (second, 1.0),
    ] {
        at += unit * seconds(text)?;
    }
    Ok(Arrival {
        at,
        tenant: 0,
        priority: 0,
        conversation: 0,
        shared_tokens: 0,
        prompt_tokens: tokens("ContextTokens", prompt)?,
        output_tokens: tokens("GeneratedTokens", output)?,
    })
}

fn seconds(text: &str) -> Result<f64, String> {
    let value: f64 = text.parse().map_err(|_| wrong("time", text))?;
    (0.0..1e9)
        .contains(&value)
        .then_some(value)
        .ok_or_else(|| wrong("time", text))
}

fn number(field: &str, text: &str) -> Result<usize, String> {
    let value: usize = text.parse().map_err(|_| wrong(field, text))?;
    (value <= u32::MAX as usize)
        .then_some(value)
        .ok_or_else(|| wrong(field, text))
}

fn tokens(field: &str, text: &str) -> Result<usize, String> {
    match number(field, text)? {
        value @ 1..=MOST_TOKENS => Ok(value),
        value => Err(format!("{field} is {value}, not from 1 to {MOST_TOKENS}")),
    }
}

fn wrong(field: &str, text: &str) -> String {
    format!("{field}: {text:?} is not what it should be")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_requests_in_order_of_time() {
        let arrivals = parse("# a comment\n\n5.5 2 -1 7 40 100 20\n1.5 0 0 0 0 1 1\n").unwrap();
        assert_eq!(arrivals.len(), 2);
        assert_eq!(
            arrivals[1],
            Arrival {
                at: 4.0,
                tenant: 2,
                priority: -1,
                conversation: 7,
                shared_tokens: 40,
                prompt_tokens: 100,
                output_tokens: 20,
            }
        );
    }

    #[test]
    fn azures_files_are_read() {
        let text = "TIMESTAMP,ContextTokens,GeneratedTokens\n\
            2023-11-16 23:59:59.5000000,374,44\n2023-11-17 00:00:01.2500000+00:00,2,93";
        let arrivals = parse(text).unwrap();
        assert_eq!((arrivals[0].at, arrivals[1].at), (0.0, 1.75));
        assert_eq!(
            (arrivals[0].prompt_tokens, arrivals[1].output_tokens),
            (374, 93)
        );
    }

    #[test]
    fn what_is_wrong_is_told_with_its_line() {
        for (text, words) in [
            ("", "no requests"),
            ("1 2 3", "line 1: 3 fields where 7 are due"),
            ("\n1 0 0 0 0 0 1", "line 2: prompt_tokens is 0"),
            ("nan 0 0 0 0 1 1", "line 1: time: \"nan\""),
            ("1 0 300 0 0 1 1", "priority: \"300\""),
            ("1 0 0 0 -1 1 1", "shared_tokens: \"-1\""),
            ("1 0 0 0 0 1 99999999", "output_tokens is 99999999"),
            (
                "TIMESTAMP,ContextTokens,GeneratedTokens\nnow,1,1",
                "line 2: TIMESTAMP",
            ),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(words), "{error}");
        }
    }
}
