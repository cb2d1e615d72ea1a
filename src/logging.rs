//! Log lines go to standard error, as text or JSON; a coordinator's spans of requests also to a collector.

use anyhow::{Context, Result, anyhow};
use opentelemetry::trace::TracerProvider;
use opentelemetry_otlp::{SpanExporter, WithExportConfig};
use opentelemetry_sdk::{Resource, trace::SdkTracerProvider};
use tracing_subscriber::{
    EnvFilter, Layer, filter::filter_fn, fmt, layer::SubscriberExt, util::SubscriberInitExt,
};

use crate::config::Config;

/// Who writes the spans that are exported.
const SPANS_OF: &str = "secondwind_coordinator";

/// Starts logging as `[log]` says. Once per process.
pub fn start(config: &Config) -> Result<()> {
    start_with(config, None)
}

/// As [`start`], for a coordinator: `coordinator.otlp_endpoint` gets its spans. Within a runtime, on which they
/// are sent.
pub fn start_with_traces(config: &Config) -> Result<Traces> {
    let provider = config
        .text("coordinator.otlp_endpoint")
        .map(|address| -> Result<_> {
            let exporter = SpanExporter::builder()
                .with_tonic()
                .with_endpoint(format!("http://{address}"))
                .build()
                .context("coordinator.otlp_endpoint: cannot export spans")?;
            let resource = Resource::builder().with_service_name("secondwind").build();
            let provider = SdkTracerProvider::builder()
                .with_batch_exporter(exporter)
                .with_resource(resource)
                .build();
            Ok(provider)
        })
        .transpose()?;
    start_with(config, provider.as_ref())?;
    Ok(Traces { provider })
}

/// Spans that are still to be sent.
#[must_use]
#[derive(Debug)]
pub struct Traces {
    provider: Option<SdkTracerProvider>,
}

impl Traces {
    /// Sends the last ones.
    pub async fn end(self) {
        let Some(provider) = self.provider else {
            return;
        };
        // It waits for the runtime's own work, and must not do so on its threads.
        let ended = tokio::task::spawn_blocking(move || provider.shutdown()).await;
        if !matches!(ended, Ok(Ok(()))) {
            tracing::warn!(?ended, "the last spans may be lost");
        }
    }
}

fn start_with(config: &Config, traces: Option<&SdkTracerProvider>) -> Result<()> {
    let level = config.text("log.level").unwrap_or_else(|| "info".into());
    let filter = EnvFilter::try_new(&level)?;
    let lines = fmt::layer().with_writer(std::io::stderr);
    let lines = match config.text("log.format").as_deref() {
        Some("json") => lines.json().boxed(),
        _ => lines
            .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
            .boxed(),
    };
    // Whatever the level of the log, and no spans of the exporter's own connection.
    let spans = traces.map(|provider| {
        tracing_opentelemetry::layer()
            .with_tracer(provider.tracer("secondwind"))
            .with_location(false)
            .with_threads(false)
            .with_tracked_inactivity(false)
            .with_filter(filter_fn(|of| {
                of.is_span() && of.target().starts_with(SPANS_OF)
            }))
    });
    tracing_subscriber::registry()
        .with(lines.with_filter(filter))
        .with(spans)
        .try_init()
        .map_err(|error| anyhow!("cannot start logging: {error}"))
}
