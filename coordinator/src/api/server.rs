//! The server that clients reach, gRPC and HTTP on one port: its limits, health and
//! reflection.

use std::sync::Arc;
use std::time::Duration;

use axum::middleware::from_fn_with_state;
use secondwind_proto::FILE_DESCRIPTOR_SET;
use secondwind_proto::kserve::grpc_inference_service_server::GrpcInferenceServiceServer;
use secondwind_proto::v1::inference_server::InferenceServer;
use secondwind_proto::vllm::control_server::ControlServer;
use secondwind_proto::vllm::inference_server as vllm_inference_server;
use tonic::service::Routes;
use tonic::transport::Server;
use tonic::transport::server::Router;
use tonic_health::ServingStatus;
use tonic_health::pb::health_server::HealthServer;
use tonic_health::server::{HealthReporter, HealthService};

use super::access::{self, Gate};
use super::frontend::Frontend;
use super::http::{self, HttpSettings};
use super::inference::InferenceService;
use super::keys::ApiKeys;
use super::kserve::KserveService;
use super::vllm::VllmService;
use crate::request::Engine;

/// Full names of the services, as health checks ask for them.
pub const SERVICE_NAMES: [&str; 4] = [
    "secondwind.v1.Inference",
    "inference.GRPCInferenceService",
    "vllm.Control",
    "vllm.Inference",
];

/// A request: 4 MiB hold a prompt of about a million tokens.
pub(super) const MAX_REQUEST_BYTES: usize = 4 << 20;
/// A response: the largest is a long prompt's ids with their log-probabilities.
const MAX_RESPONSE_BYTES: usize = 16 << 20;
/// Calls at the same time on one connection.
const MAX_CONCURRENT_STREAMS: u32 = 256;
/// All headers of one call.
pub(super) const MAX_HEADER_LIST_BYTES: u32 = 16 << 10;
/// Streams that a client reset before they were accepted; more of them close the connection.
const MAX_PENDING_RESET_STREAMS: usize = 64;
/// Streams reset by us for a client's protocol errors; more of them close the connection.
const MAX_LOCAL_RESET_STREAMS: usize = 256;
/// An idle connection is asked whether it is still there, so that a client that vanished frees its blocks.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(20);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// Tells health checks whether the group serves.
#[derive(Clone, Debug)]
pub struct ServingHandle {
    reporter: HealthReporter,
}

impl ServingHandle {
    /// Sets the server's and the services' status.
    pub async fn set_serving(&self, serving: bool) {
        let status = if serving {
            ServingStatus::Serving
        } else {
            ServingStatus::NotServing
        };
        for name in SERVICE_NAMES.into_iter().chain([""]) {
            self.reporter.set_service_status(name, status).await;
        }
    }
}

/// Health checks that say NOT_SERVING until the handle says otherwise.
pub async fn health() -> (ServingHandle, HealthServer<HealthService>) {
    let reporter = HealthReporter::new();
    let handle = ServingHandle {
        reporter: reporter.clone(),
    };
    handle.set_serving(false).await;
    let service = HealthService::from_health_reporter(reporter);
    (handle, HealthServer::new(service))
}

/// Everything that clients reach, ready to be served on a listener. Fails only if the descriptors that
/// were compiled in do not parse.
pub fn router<E: Engine>(
    frontend: Arc<Frontend<E>>,
    health: HealthServer<HealthService>,
    settings: HttpSettings,
    keys: ApiKeys,
) -> Result<Router, tonic_reflection::server::Error> {
    let reflection = || {
        let builder = tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            .with_service_name("grpc.health.v1.Health");
        // The descriptors also describe what workers speak, which is not served here.
        SERVICE_NAMES
            .into_iter()
            .fold(builder, |builder, name| builder.with_service_name(name))
    };
    let inference = InferenceServer::new(InferenceService::new(Arc::clone(&frontend)))
        .max_decoding_message_size(MAX_REQUEST_BYTES)
        .max_encoding_message_size(MAX_RESPONSE_BYTES);
    let vllm = Arc::new(VllmService::new(Arc::clone(&frontend)));
    let vllm_control = ControlServer::from_arc(Arc::clone(&vllm));
    let vllm_inference = vllm_inference_server::InferenceServer::from_arc(vllm)
        .max_decoding_message_size(MAX_REQUEST_BYTES)
        .max_encoding_message_size(MAX_RESPONSE_BYTES);
    let kserve = KserveService::new(Arc::clone(&frontend), settings.strict);
    let kserve = GrpcInferenceServiceServer::new(kserve)
        .max_decoding_message_size(MAX_REQUEST_BYTES)
        .max_encoding_message_size(MAX_RESPONSE_BYTES);
    let gate = Gate {
        keys,
        metrics: Arc::clone(frontend.metrics()),
        model: frontend.model().name.as_str().into(),
    };
    // What no gRPC service takes by its path is HTTP's, mistakes included.
    let routes = Routes::from(http::router(frontend, settings))
        .add_service(health)
        .add_service(reflection().build_v1()?)
        .add_service(reflection().build_v1alpha()?)
        .add_service(inference)
        .add_service(vllm_inference)
        .add_service(vllm_control)
        .add_service(kserve);
    // All of them lie behind one door, which knows nothing of routes.
    let behind = axum::Router::new()
        .fallback_service(routes.prepare().into_axum_router())
        .layer(from_fn_with_state(Arc::new(gate), access::enter));
    Ok(Server::builder()
        .accept_http1(true)
        .max_concurrent_streams(MAX_CONCURRENT_STREAMS)
        .http2_max_header_list_size(MAX_HEADER_LIST_BYTES)
        .http2_max_pending_accept_reset_streams(Some(MAX_PENDING_RESET_STREAMS))
        .http2_max_local_error_reset_streams(Some(MAX_LOCAL_RESET_STREAMS))
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .add_routes(Routes::from(behind)))
}
