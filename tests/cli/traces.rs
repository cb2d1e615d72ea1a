//! Spans of requests, as a collector gets them.

use std::sync::{Arc, Mutex};

use opentelemetry_proto::tonic::{
    collector::trace::v1::{
        ExportTraceServiceRequest, ExportTraceServiceResponse,
        trace_service_server::{TraceService, TraceServiceServer},
    },
    trace::v1::Span,
};
use tokio::{net::TcpListener, runtime::Runtime};
use tonic::{
    Request, Response, Status,
    transport::{Server, server::TcpIncoming},
};

use crate::{daemons::Guard, http::http_with};

/// Keeps what it is sent.
#[derive(Clone, Default)]
struct Collector(Arc<Mutex<Vec<Span>>>);

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let resources = request.into_inner().resource_spans.into_iter();
        let spans = resources
            .flat_map(|it| it.scope_spans)
            .flat_map(|it| it.spans);
        self.0.lock().unwrap().extend(spans);
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

#[test]
fn a_request_is_a_span_in_its_clients_trace() {
    let runtime = Runtime::new().unwrap();
    let collector = Collector::default();
    let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
    let endpoint = listener.local_addr().unwrap().to_string();
    let server = Server::builder().add_service(TraceServiceServer::new(collector.clone()));
    runtime.spawn(server.serve_with_incoming(TcpIncoming::from(listener)));

    let arguments = ["coordinator", "--model", "builtin", "--world-size", "1"];
    let ports = ["--listen", "127.0.0.1:0", "--cluster-listen", "127.0.0.1:0"];
    // Spans are not the log's, and do not go by its level.
    let traces = ["--otlp-endpoint", &endpoint, "--log-level", "error"];
    let mut coordinator = Guard::start(&[&arguments[..], &ports, &traces].concat());
    let line = coordinator.first_line();
    let addresses = line.strip_prefix("listening client=").unwrap();
    let (client, _) = addresses.split_once(" cluster=").unwrap();
    let header = "Traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\r\n\
                  X-Request-Id: call-7\r\n";
    assert_eq!(http_with(client, "GET", "/v1/models", header, "").0, 200);
    assert_eq!(http_with(client, "GET", "/no/such/path", "", "").0, 404);
    assert_eq!(coordinator.end("-TERM"), Some(0));

    let spans = collector.0.lock().unwrap();
    let named = |name: &str| {
        let mut named = spans.iter().filter(|span| span.name == name);
        let span = named
            .next()
            .unwrap_or_else(|| panic!("no {name}: {spans:?}"));
        assert!(named.next().is_none(), "{name} twice");
        span
    };
    let hex = |bytes: &[u8]| {
        bytes
            .iter()
            .map(|it| format!("{it:02x}"))
            .collect::<String>()
    };
    let span = named("GET /v1/models");
    assert_eq!(hex(&span.trace_id), "0af7651916cd43dd8448eb211c80319c");
    assert_eq!(hex(&span.parent_span_id), "b7ad6b7169203331");
    let attribute = |key: &str| format!("{:?}", span.attributes.iter().find(|it| it.key == key));
    assert!(attribute("request_id").contains("\"call-7\""), "{span:?}");
    assert!(attribute("status").contains("200"), "{span:?}");
    let own = named("GET /no/such/path");
    assert!(own.parent_span_id.is_empty() && own.trace_id != span.trace_id);
}
