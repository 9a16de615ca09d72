//! A trained model of series: series in, classes or numbers out; and, of an encoder, streams of frames.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::Router;
use axum::extract::ws::{CloseFrame, Message, WebSocket, WebSocketUpgrade, close_code};
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use futures_util::SinkExt;
use hymba::ndarray::{Array2, Array3, ArrayView1};
use hymba::{Predictor, PredictorState};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::{Semaphore, watch};
use tokio::time::{Instant, timeout, timeout_at};

use super::Limits;
use super::error::{ApiError, ApiResult, Failure};
use super::http::{self, Service};
use super::metrics::Metrics;
use crate::series::{Answer, Model, Said};

/// Bytes of a message on a stream, at most.
const LONGEST_MESSAGE: usize = 1 << 20;
/// Frames of a series at most, where no option says otherwise.
const LONGEST_SERIES: usize = 1 << 16;
/// Frames of a message on a stream, at most; and of series that are predicted in one turn, unless one alone is longer.
const PART: usize = 4096;

/// For a client to hear that its stream ends.
const GOODBYE: Duration = Duration::from_secs(1);

struct Series {
    model: Arc<Model>,
    /// Numbers in a frame.
    channels: usize,
    name: String,
    limits: Limits,
    metrics: Arc<Metrics>,
    /// Requests that are at work or wait.
    places: Arc<Semaphore>,
    streams: Arc<Semaphore>,
    /// One at a time uses the cores.
    turn: Arc<Semaphore>,
    /// Whether the server is going down. Streams hold receivers.
    stop: watch::Sender<bool>,
}

#[derive(Deserialize)]
struct ClassifyRequest {
    model: Option<String>,
    series: Vec<Vec<Vec<f32>>>,
}

/// One frame, or several.
#[derive(Deserialize)]
#[serde(untagged)]
enum Frames {
    One(Vec<f32>),
    Many(Vec<Vec<f32>>),
}

pub fn service(
    model: Model,
    name: String,
    limits: &Limits,
    metrics: &Arc<Metrics>,
    stop: &watch::Sender<bool>,
) -> Service {
    let channels = match &model {
        Model::Ensemble(ensemble) => ensemble.kernels().features().channels(),
        Model::Kernels(kernels) => kernels.features().channels(),
        Model::Encoder(predictor) => predictor.options().embed_dim,
    };
    let series = Arc::new(Series {
        model: Arc::new(model),
        channels,
        name,
        limits: limits.clone(),
        metrics: metrics.clone(),
        places: Arc::new(Semaphore::new((limits.concurrent + limits.waiting).min(Semaphore::MAX_PERMITS))),
        streams: Arc::new(Semaphore::new(limits.concurrent.min(Semaphore::MAX_PERMITS))),
        turn: Arc::new(Semaphore::new(1)),
        stop: stop.clone(),
    });
    let router = Router::new()
        .route("/v1/classify", post(classify))
        .route("/stream", get(stream))
        .route("/v1/models", get(models))
        .with_state(series.clone());
    Service { router, close: Box::new(|| ()), abort: Box::new(move || series.turn.close()), join: Box::new(|| ()) }
}

async fn models(State(series): State<Arc<Series>>) -> Response {
    let task = series.model.task();
    let model = json!({
        "id": series.name, "object": "model", "owned_by": "hymba",
        "channels": series.channels, "labels": task.labels(), "outputs": task.outputs(),
    });
    Json(json!({"object": "list", "data": [model]})).into_response()
}

async fn classify(State(series): State<Arc<Series>>, request: Request) -> ApiResult<Response> {
    let asked: ClassifyRequest = http::json(request, &series.limits).await?;
    if let Some(asked) = asked.model.filter(|asked| *asked != series.name) {
        return Err(ApiError::no_model(&asked, &series.name));
    }
    let deadline = Instant::now() + series.limits.timeout;
    let _place = series.places.clone().try_acquire_owned().map_err(|_| ApiError::busy())?;
    if asked.series.is_empty() {
        return Err(ApiError::field("series", "there are none"));
    }
    let all: Vec<Array2<f32>> = asked.series.into_iter().map(array).collect::<ApiResult<_>>()?;
    let most = series.limits.context.unwrap_or(LONGEST_SERIES);
    if let Some(length) = all.iter().map(Array2::nrows).find(|length| *length > most) {
        return Err(ApiError::field("series", format!("one has {length} frames, at most {most} are allowed")));
    }
    // none is predicted where one cannot be
    if let Some(at) = all.iter().position(|one| one.is_empty() || one.ncols() != series.channels) {
        let message = format!("series {at} must have at least one frame, each of {} numbers", series.channels);
        return Err(ApiError::field("series", message));
    }
    let mut data = Vec::new();
    for part in parts(all) {
        let model = series.model.clone();
        let predicted = series.work(deadline, move || model.predict(&part).map_err(refused)).await?;
        for row in predicted.rows() {
            let mut one = json!({"index": data.len()});
            series.describe(row, &mut one);
            data.push(one);
        }
    }
    series.metrics.series.add(data.len());
    Ok(Json(json!({"object": "list", "model": series.name, "data": data})).into_response())
}

/// The series of a request, some at a time: between two turns others have theirs, and nothing goes on for a client that has left.
fn parts(all: Vec<Array2<f32>>) -> Vec<Vec<Array2<f32>>> {
    let (mut parts, mut frames) = (Vec::<Vec<_>>::new(), 0);
    for series in all {
        frames += series.nrows();
        match parts.last_mut() {
            Some(part) if frames <= PART => part.push(series),
            _ => {
                frames = series.nrows();
                parts.push(vec![series]);
            }
        }
    }
    parts
}

fn refused(error: anyhow::Error) -> ApiError {
    match error.downcast::<hymba::Error>() {
        Ok(error) => error.into(),
        Err(error) => ApiError::internal(&error.to_string()),
    }
}

/// Frames `[length][channels]` as an array.
fn array(frames: Vec<Vec<f32>>) -> ApiResult<Array2<f32>> {
    let width = frames.first().map_or(0, Vec::len);
    if let Some(at) = frames.iter().position(|frame| frame.len() != width) {
        let message = format!("frame {at} has {} numbers, but the first has {width}", frames[at].len());
        return Err(ApiError::field("series", message));
    }
    let (length, numbers) = (frames.len(), frames.concat());
    if let Some(at) = numbers.iter().position(|number| !number.is_finite()) {
        let message = format!("frame {} has a number that 32 bits do not hold", at / width);
        return Err(ApiError::field("series", message));
    }
    Array2::from_shape_vec((length, width), numbers).map_err(|error| ApiError::field("series", error.to_string()))
}

impl Series {
    fn encoder(&self) -> Option<&Predictor> {
        match &*self.model {
            Model::Encoder(predictor) => Some(predictor),
            Model::Ensemble(_) | Model::Kernels(_) => None,
        }
    }

    /// Runs on the cores, when it is its turn. What has begun cannot be cut short, only not waited for.
    async fn work<T: Send + 'static>(
        &self,
        deadline: Instant,
        work: impl FnOnce() -> ApiResult<T> + Send + 'static,
    ) -> ApiResult<T> {
        let turn = match timeout_at(deadline, self.turn.clone().acquire_owned()).await {
            Ok(Ok(turn)) => turn,
            Ok(Err(_)) => return Err(ApiError::stopping()),
            Err(_) => return Err(Failure::Timeout.into()),
        };
        let done = tokio::task::spawn_blocking(move || {
            let _turn = turn;
            work()
        });
        match timeout_at(deadline, done).await {
            Ok(done) => done.unwrap_or_else(|_| Err(ApiError::internal("predicting panicked"))),
            Err(_) => Err(Failure::Timeout.into()),
        }
    }

    fn describe(&self, row: ArrayView1<f32>, value: &mut Value) {
        let task = self.model.task();
        let answer = Answer::of(task, row);
        match &answer.said {
            Said::Numbers => value["values"] = json!(answer.numbers),
            Said::Class(class) => value["label"] = json!(class),
            Said::Labels(labels) => value["labels"] = json!(labels),
        }
        if !matches!(answer.said, Said::Numbers) {
            value["probabilities"] = answer.probabilities(task);
        }
    }
}

async fn stream(State(series): State<Arc<Series>>, upgrade: WebSocketUpgrade) -> ApiResult<Response> {
    let Some(state) = series.encoder().map(|predictor| predictor.new_state(1)) else {
        return Err(ApiError::bad("this model needs whole series; for streams, train one with --streaming"));
    };
    let stopping = series.stop.subscribe();
    if *stopping.borrow() {
        return Err(ApiError::stopping());
    }
    let place = series.streams.clone().try_acquire_owned().map_err(|_| ApiError::busy())?;
    let upgrade = upgrade.max_message_size(LONGEST_MESSAGE).max_frame_size(LONGEST_MESSAGE);
    Ok(upgrade.on_upgrade(async move |socket| {
        series.metrics.streams.add(1);
        series.follow(socket, state, stopping).await;
        series.metrics.streams.subtract(1);
        drop(place);
    }))
}

impl Series {
    /// Answers frames with predictions, until the client has enough, falls silent, or the server stops.
    async fn follow(&self, mut socket: WebSocket, mut state: PredictorState, mut stopping: watch::Receiver<bool>) {
        loop {
            let message = tokio::select! {
                biased;
                () = async { drop(stopping.wait_for(|stop| *stop).await) } => {
                    let close = CloseFrame { code: close_code::AWAY, reason: "the server is shutting down".into() };
                    let _ = timeout(GOODBYE, async {
                        socket.send(Message::Close(Some(close))).await?;
                        while socket.recv().await.transpose()?.is_some() {}
                        Ok::<_, axum::Error>(())
                    })
                    .await;
                    return;
                }
                message = timeout(self.limits.timeout, socket.recv()) => match message {
                    Ok(Some(Ok(message))) => message,
                    _ => break,
                },
            };
            let bytes = match message {
                Message::Text(text) => text.as_str().as_bytes().to_vec(),
                Message::Binary(_) => b"binary".to_vec(),
                Message::Close(_) => break,
                Message::Ping(_) | Message::Pong(_) => continue,
            };
            let answer = match self.next(state, bytes).await {
                Ok((next, answer)) => {
                    state = next;
                    answer
                }
                Err((before, error)) => {
                    let Some(before) = before else {
                        let _ = socket.send(Message::Text(error.body().to_string().into())).await;
                        break;
                    };
                    state = before;
                    error.body()
                }
            };
            let sent = timeout(self.limits.io_timeout, socket.send(Message::Text(answer.to_string().into()))).await;
            if !matches!(sent, Ok(Ok(()))) {
                break;
            }
        }
        let _ = timeout(self.limits.io_timeout, socket.close()).await;
    }

    /// The prediction after one frame more, or several. After an error that the client made the state is as before.
    async fn next(
        &self,
        mut state: PredictorState,
        bytes: Vec<u8>,
    ) -> Result<(PredictorState, Value), (Option<PredictorState>, ApiError)> {
        let frames = match serde_json::from_slice(&bytes) {
            Ok(Frames::One(frame)) => array(vec![frame]),
            Ok(Frames::Many(frames)) => array(frames),
            Err(_) => Err(ApiError::bad("a message is one frame as a JSON list of numbers, or a list of frames")),
        };
        let frames = match frames {
            Ok(frames) => frames,
            Err(error) => return Err((Some(state), error)),
        };
        let (count, model) = (frames.nrows(), self.model.clone());
        if count > PART {
            let error = ApiError::bad(format!("a message has {count} frames, at most {PART} are allowed"));
            return Err((Some(state), error));
        }
        let done = self.work(Instant::now() + self.limits.timeout, move || {
            let Model::Encoder(predictor) = &*model else {
                return Ok((state, Err(ApiError::bad("this model follows no streams"))));
            };
            let predicted = if frames.nrows() == 1 {
                predictor.step(&frames, &mut state)
            } else {
                let (length, width) = frames.dim();
                let x = Array3::from_shape_vec((1, length, width), frames.into_raw_vec_and_offset().0);
                match x {
                    Ok(x) => predictor.prefill(&x, &mut state),
                    Err(error) => return Ok((state, Err(ApiError::bad(error.to_string())))),
                }
            };
            Ok((state, predicted.map_err(ApiError::from)))
        });
        match done.await {
            Ok((state, Ok(predicted))) => {
                self.metrics.frames.add(count);
                let mut answer = json!({"frames": state.frames()});
                self.describe(predicted.row(0), &mut answer);
                Ok((state, answer))
            }
            Ok((state, Err(error))) => Err((Some(state), error)),
            Err(error) => Err((None, error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn series_are_predicted_some_at_a_time() {
        let lengths = |lengths: &[usize]| -> Vec<Vec<usize>> {
            let all = lengths.iter().map(|&length| Array2::zeros((length, 1))).collect();
            parts(all).iter().map(|part| part.iter().map(Array2::nrows).collect()).collect()
        };
        assert_eq!(
            lengths(&[1, 2, PART - 3, 1, 3 * PART, 5]),
            [vec![1, 2, PART - 3], vec![1], vec![3 * PART], vec![5]]
        );
        assert!(lengths(&[]).is_empty());
    }

    #[test]
    fn frames_are_of_one_width_and_finite() {
        assert_eq!(array(vec![vec![1.0, 2.0]; 3]).unwrap().dim(), (3, 2));
        assert!(array(vec![vec![1.0], vec![1.0, 2.0]]).is_err());
        for bad in [f32::INFINITY, f32::NAN] {
            assert!(array(vec![vec![0.0, 1.0], vec![bad, 1.0]]).is_err());
        }
    }
}
