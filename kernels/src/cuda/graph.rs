//! Recorded sequences of launches.

use std::sync::Arc;

use cudarc::driver::{CudaGraph, CudaStream, DriverError, sys};

use super::{
    CudaError,
    device::{Device, driver_error},
};

/// A recorded sequence of launches.
pub struct Graph(CudaGraph);

/// A recording that goes on; dropped, it is ended and thrown away.
pub struct Recording(Option<Arc<CudaStream>>);

impl Recording {
    /// Ends it.
    ///
    /// # Errors
    /// Something in it cannot be recorded, or nothing was.
    pub fn finish(mut self) -> Result<Graph, CudaError> {
        match self.end() {
            Some(Ok(Some(graph))) => {
                // The first launch would else upload it.
                let uploaded = graph.upload();
                uploaded.map_err(|error| driver_error("upload a graph", error))?;
                Ok(Graph(graph))
            }
            Some(Err(error)) => Err(driver_error("record a graph", error)),
            Some(Ok(None)) | None => Err(CudaError::Driver {
                op: "record a graph".into(),
                code: "empty".into(),
                text: "nothing was recorded".into(),
            }),
        }
    }

    fn end(&mut self) -> Option<Result<Option<CudaGraph>, DriverError>> {
        let flags = sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
        Some(self.0.take()?.end_capture(flags))
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        // Somebody failed while recording: that error is the one to tell.
        let _ = self.end();
    }
}

// SAFETY: a graph belongs to no thread; it is used by one at a time, through `&mut` of its owner.
unsafe impl Send for Graph {}

impl Device {
    /// Records what is launched from here on instead of running it.
    ///
    /// # Errors
    /// The driver's.
    pub fn start_recording(&self) -> Result<Recording, CudaError> {
        self.bind()?;
        self.stream
            .begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
            .map_err(|error| driver_error("record a graph", error))?;
        Ok(Recording(Some(self.stream.clone())))
    }

    /// Records what `give` launches.
    ///
    /// # Errors
    /// Of `give`, or something in it that cannot be recorded.
    pub fn record<E: From<CudaError>>(
        &self,
        give: impl FnOnce() -> Result<(), E>,
    ) -> Result<Graph, E> {
        let recording = self.start_recording()?;
        give()?;
        Ok(recording.finish()?)
    }

    /// Runs a recording, in stream order.
    ///
    /// # Errors
    /// The driver's.
    pub fn replay(&self, graph: &Graph) -> Result<(), CudaError> {
        self.bind()?;
        graph
            .0
            .launch()
            .map_err(|error| driver_error("replay a graph", error))
    }
}
