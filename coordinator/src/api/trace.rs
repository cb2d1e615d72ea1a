//! A request's place in its client's trace, by the header `traceparent` of W3C's Trace Context.

use axum::http::HeaderMap;
use opentelemetry::Context;
use opentelemetry::trace::{SpanContext, SpanId, TraceContextExt, TraceFlags, TraceId, TraceState};
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt;

const TRACEPARENT: &str = "traceparent";

/// The client's span, if it names one. What is malformed starts a trace of its own, as the standard wants.
pub(super) fn parent(headers: &HeaderMap) -> Option<SpanContext> {
    let mut values = headers.get_all(TRACEPARENT).iter();
    let (Some(value), None) = (values.next(), values.next()) else {
        return None;
    };
    let mut parts = value.to_str().ok()?.split('-');
    let mut hex = |digits: usize| {
        let legal = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
        let part = parts.next()?;
        (part.len() == digits && part.bytes().all(legal)).then_some(part)
    };
    let (version, trace, span, flags) = (hex(2)?, hex(32)?, hex(16)?, hex(2)?);
    // A later version may have more to say.
    if version == "ff" || (version == "00" && parts.next().is_some()) {
        return None;
    }
    let context = SpanContext::new(
        TraceId::from_hex(trace).ok()?,
        SpanId::from_hex(span).ok()?,
        TraceFlags::new(u8::from_str_radix(flags, 16).ok()?),
        true,
        TraceState::NONE,
    );
    context.is_valid().then_some(context)
}

/// Puts `span` under `parent`.
pub(super) fn join(span: &Span, parent: SpanContext) {
    // Without an exporter there is no trace to join.
    let _ = span.set_parent(Context::new().with_remote_span_context(parent));
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
    const SPAN: &str = "b7ad6b7169203331";

    fn read(values: &[String]) -> Option<(String, String, bool)> {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(TRACEPARENT, value.parse().unwrap());
        }
        let parent = parent(&headers)?;
        let ids = (parent.trace_id().to_string(), parent.span_id().to_string());
        Some((ids.0, ids.1, parent.is_sampled()))
    }

    #[test]
    fn a_parent_is_taken_as_the_standard_writes_it() {
        let of = |text: &str| read(&[text.to_owned()]);
        for (flags, sampled) in [("00", false), ("01", true)] {
            let expected = Some((TRACE.to_owned(), SPAN.to_owned(), sampled));
            assert_eq!(of(&format!("00-{TRACE}-{SPAN}-{flags}")), expected);
            assert_eq!(of(&format!("cc-{TRACE}-{SPAN}-{flags}-what")), expected);
        }
        for wrong in [
            String::new(),
            format!("00-{TRACE}-{SPAN}"),
            format!("00-{TRACE}-{SPAN}-01-what"),
            format!("ff-{TRACE}-{SPAN}-01"),
            format!("00-{}-{SPAN}-01", "0".repeat(32)),
            format!("00-{TRACE}-{}-01", "0".repeat(16)),
            format!("00-{}-{SPAN}-01", TRACE.to_uppercase()),
            format!("00-+{}-{SPAN}-01", &TRACE[1..]),
        ] {
            assert_eq!(of(&wrong), None, "{wrong}");
        }
        let twice = format!("00-{TRACE}-{SPAN}-01");
        assert_eq!(read(&[twice.clone(), twice]), None);
    }
}
