//! OpenAI's endpoints of a language model.

use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use axum::Json;
use axum::Router;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use hymba::HymbaLm;
use hymba::lm::{ChatOptions, GenerateOptions, Tokenizer};
use serde_json::{Value, json};
use tokio::sync::mpsc::unbounded_channel;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use super::Limits;
use super::answer::{Answer, Echo, Events, Kind};
use super::engine::{Engine, EngineOptions, Job};
use super::error::{ApiError, ApiResult};
use super::http::{self, Service};
use super::metrics::Metrics;
use super::prompt::Prompt;
use super::request::{ChatRequest, CompletionRequest, PromptInput, ResponseFormat, Sampling};
use super::vocabulary::Vocabulary;

struct Language {
    tokenizer: Tokenizer,
    vocabulary: Arc<Vocabulary>,
    engine: Arc<Engine>,
    defaults: GenerateOptions,
    name: String,
    created: u64,
    limits: Limits,
    /// Tokens of a prompt and its continuation together.
    context: usize,
    vocabulary_size: usize,
    places: Arc<Semaphore>,
    count: AtomicU64,
    random: RandomState,
    #[cfg(feature = "schema")]
    schemas: Option<super::schema::Schemas>,
}

pub fn service(
    lm: HymbaLm,
    tokenizer: Tokenizer,
    defaults: GenerateOptions,
    name: String,
    limits: &Limits,
    metrics: &Arc<Metrics>,
) -> Result<Service> {
    let config = lm.config();
    let size = config.vocab_size;
    ensure!(
        tokenizer.vocab_size() <= size,
        "the tokenizer has {} tokens and the model {size}: it is another model's",
        tokenizer.vocab_size()
    );
    let positions = config.max_position_embeddings.saturating_sub(config.num_memory_tokens).max(2);
    let vocabulary = Arc::new(Vocabulary::new(&tokenizer, size));
    #[cfg(feature = "schema")]
    let schemas = match config.eos_token_id.first() {
        Some(&eos) => Some(super::schema::Schemas::new(&vocabulary, eos)?),
        None => None,
    };
    let options = EngineOptions { rows: limits.concurrent, piece: limits.piece, cache_bytes: limits.cache_bytes };
    // what the meta tokens leave behind, before the first request waits for it
    lm.new_state(1);
    let engine = Arc::new(Engine::start(Arc::new(lm), tokenizer.clone(), options, metrics.clone())?);
    let places = Arc::new(Semaphore::new((limits.concurrent + limits.waiting).min(Semaphore::MAX_PERMITS)));
    let created = SystemTime::now().duration_since(UNIX_EPOCH).context("the clock is before 1970")?.as_secs();
    let language = Arc::new(Language {
        tokenizer,
        vocabulary,
        engine: engine.clone(),
        defaults,
        name,
        created,
        context: limits.context.unwrap_or(positions),
        limits: limits.clone(),
        vocabulary_size: size,
        places,
        count: AtomicU64::new(0),
        random: RandomState::new(),
        #[cfg(feature = "schema")]
        schemas,
    });
    let router = Router::new()
        .route("/v1/chat/completions", post(chat))
        .route("/v1/completions", post(complete))
        .route("/v1/models", get(models))
        .route("/v1/models/{model}", get(model))
        .with_state(language);
    let (close, abort) = (engine.clone(), engine.clone());
    Ok(Service {
        router,
        close: Box::new(move || close.close()),
        abort: Box::new(move || abort.abort()),
        join: Box::new(move || engine.join()),
    })
}

async fn models(State(language): State<Arc<Language>>) -> Response {
    Json(json!({"object": "list", "data": [language.description()]})).into_response()
}

async fn model(
    State(language): State<Arc<Language>>,
    axum::extract::Path(asked): axum::extract::Path<String>,
) -> ApiResult<Response> {
    language.check_model(Some(&asked))?;
    Ok(Json(language.description()).into_response())
}

async fn complete(State(language): State<Arc<Language>>, request: Request) -> ApiResult<Response> {
    let mut asked: CompletionRequest = http::json(request, &language.limits).await?;
    language.check_model(asked.sampling.model.as_deref())?;
    asked.check()?;
    let log_probs = asked.alternatives()?;
    let prompt = std::mem::replace(&mut asked.prompt, super::request::PromptField::Ids(Vec::new()));
    let inputs = prompt.into_inputs();
    if inputs.is_empty() {
        return Err(ApiError::field("prompt", "there is none"));
    }
    let (per_prompt, options) = language.options(&asked.sampling)?;
    let permits = language.permits(inputs.len(), per_prompt)?;
    let encoding = language.clone();
    let echoes = asked.echo.unwrap_or_default();
    let max_tokens = asked.max_tokens.unwrap_or(16);
    let (prompts, echo, permits) = blocking(move || {
        let (mut prompts, mut echo) = (Vec::new(), Vec::new());
        for input in inputs {
            let spells_special = matches!(input, PromptInput::Ids(_));
            let (text, ids) = match input {
                PromptInput::Text(text) => {
                    let ids = encoding.tokenizer.encode_plain(&text)?;
                    (text, ids)
                }
                PromptInput::Ids(ids) => {
                    if let Some(id) = ids.iter().find(|id| **id as usize >= encoding.vocabulary_size) {
                        let size = encoding.vocabulary_size;
                        return Err(ApiError::field("prompt", format!("id {id} is not below {size}")));
                    }
                    let text = if echoes {
                        encoding.tokenizer.decode_keep_special(&ids).unwrap_or_default()
                    } else {
                        String::new()
                    };
                    (text, ids)
                }
            };
            if ids.is_empty() {
                return Err(ApiError::field("prompt", "it has no tokens; give at least one"));
            }
            encoding.check_length(ids.len(), max_tokens)?;
            if echoes {
                echo.push(Echo { text, ids: ids.clone(), spells_special });
            }
            prompts.push(Prompt::new(ids, &[], encoding.limits.piece));
        }
        Ok((prompts, echo, permits))
    })
    .await?;
    let score_prompt = echoes && log_probs.is_some();
    let prompt_tokens = prompts.iter().map(|prompt| prompt.ids.len()).sum();
    let choices = prompts.len() * per_prompt;
    let events = language.submit(prompts, permits, &options, max_tokens, per_prompt, log_probs, score_prompt)?;
    let kind = Kind::Completion { echo: echoes.then_some(echo) };
    let answer = language.answer("cmpl", kind, &asked.sampling, log_probs.is_some(), per_prompt, prompt_tokens);
    respond(Answer { choices, ..answer }, events, asked.sampling.stream).await
}

async fn chat(State(language): State<Arc<Language>>, request: Request) -> ApiResult<Response> {
    let asked: ChatRequest = http::json(request, &language.limits).await?;
    language.check_model(asked.sampling.model.as_deref())?;
    let log_probs = asked.alternatives()?;
    let (messages, (tools, must_call)) = (asked.messages()?, asked.tools()?);
    let (per_prompt, mut options) = language.options(&asked.sampling)?;
    let permits = language.permits(1, per_prompt)?;
    let with_tools = !tools.is_empty();
    let (encoding, format) = (language.clone(), asked.response_format);
    let max_tokens = asked.max_completion_tokens.or(asked.max_tokens).unwrap_or(usize::MAX);
    let (prompt, options, permits) = blocking(move || {
        options.stop_strings.extend(encoding.tokenizer.chat_stop_strings());
        let options = encoding.format(format, must_call, options)?;
        let chat = ChatOptions::new().tools(tools);
        let Language { tokenizer, vocabulary, limits, .. } = &*encoding;
        let check = |tokens| encoding.check_length(tokens, max_tokens);
        let prompt = Prompt::of_chat(tokenizer, vocabulary, &messages, &chat, limits.piece, check)?;
        Ok((prompt, options, permits))
    })
    .await?;
    let prompt_tokens = prompt.ids.len();
    let events = language.submit(vec![prompt], permits, &options, max_tokens, per_prompt, log_probs, false)?;
    let kind = Kind::Chat { tools: with_tools };
    let answer = language.answer("chatcmpl", kind, &asked.sampling, log_probs.is_some(), per_prompt, prompt_tokens);
    respond(answer, events, asked.sampling.stream).await
}

async fn respond(answer: Answer, events: Events, stream: Option<bool>) -> ApiResult<Response> {
    match stream {
        Some(true) => Ok(answer.stream(events)),
        _ => Ok(Json(answer.whole(events).await?).into_response()),
    }
}

/// Runs what takes a while beside what answers. When the client leaves, what has not begun never does; but it stays in its queue for
/// a while, so places that it takes must be moved into it, or leaving would make room for more than there is.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> ApiResult<T> + Send + 'static) -> ApiResult<T> {
    let (sender, done) = oneshot::channel();
    tokio::task::spawn_blocking(move || {
        if !sender.is_closed() {
            let _ = sender.send(work());
        }
    });
    done.await.unwrap_or_else(|_| Err(ApiError::internal("reading a request panicked")))
}

impl Language {
    fn description(&self) -> Value {
        json!({
            "id": self.name, "object": "model", "created": self.created, "owned_by": "hymba", "max_model_len": self.context,
        })
    }

    fn check_model(&self, asked: Option<&str>) -> ApiResult<()> {
        match asked {
            Some(asked) if asked != self.name => Err(ApiError::no_model(asked, &self.name)),
            _ => Ok(()),
        }
    }

    fn id(&self, kind: &str) -> String {
        format!("{kind}-{:016x}", self.random.hash_one(self.count.fetch_add(1, Ordering::Relaxed)))
    }

    /// An answer to one prompt.
    fn answer(
        &self,
        id: &str,
        kind: Kind,
        sampling: &Sampling,
        log_probs: bool,
        per_prompt: usize,
        prompt_tokens: usize,
    ) -> Answer {
        Answer {
            id: self.id(id),
            created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs()),
            model: self.name.clone(),
            kind,
            choices: per_prompt,
            per_prompt,
            prompt_tokens,
            log_probs,
            include_usage: sampling.includes_usage(),
            vocabulary: self.vocabulary.clone(),
        }
    }

    /// Continuations of each prompt, and the options that they have in common.
    fn options(&self, sampling: &Sampling) -> ApiResult<(usize, GenerateOptions)> {
        let random = self.random.hash_one((self.count.fetch_add(1, Ordering::Relaxed), 1));
        Ok((sampling.count(self.limits.concurrent)?, sampling.options(&self.defaults, random)?))
    }

    /// Holds an answer to a format, or to a call of one of some functions.
    fn format(
        &self,
        format: Option<ResponseFormat>,
        must_call: Option<Vec<Value>>,
        options: GenerateOptions,
    ) -> ApiResult<GenerateOptions> {
        if matches!((&format, &must_call), (None | Some(ResponseFormat::Text), None)) {
            return Ok(options);
        }
        #[cfg(feature = "schema")]
        return match (&self.schemas, format, must_call) {
            (Some(schemas), _, Some(functions)) => schemas.call(&functions, options),
            (Some(schemas), Some(format), None) => schemas.apply(&format, options),
            _ => Err(ApiError::bad("response_format and tool_choice need a model with an end-of-text token")),
        };
        #[cfg(not(feature = "schema"))]
        Err(ApiError::bad("response_format and tool_choice need the feature `schema`, which this server lacks"))
    }

    /// Places in the queue, for the continuations of each prompt, or none at all.
    fn permits(&self, prompts: usize, per_prompt: usize) -> ApiResult<Vec<OwnedSemaphorePermit>> {
        let all = self.limits.concurrent + self.limits.waiting;
        if prompts.saturating_mul(per_prompt) > all {
            return Err(ApiError::bad(format!("a request can have {all} sequences at most; send several requests")));
        }
        let one = |_| self.places.clone().try_acquire_many_owned(per_prompt as u32).map_err(|_| ApiError::busy());
        (0..prompts).map(one).collect()
    }

    /// Whether a prompt of so many tokens leaves room for a continuation.
    fn check_length(&self, tokens: usize, max_tokens: usize) -> ApiResult<()> {
        let most = self.context - usize::from(max_tokens > 0);
        match tokens > most {
            true => Err(ApiError::too_long(format!("the prompt has {tokens} tokens, at most {most} are allowed"))),
            false => Ok(()),
        }
    }

    /// Begins the continuations of prompts whose length is checked.
    #[allow(clippy::too_many_arguments)]
    fn submit(
        &self,
        prompts: Vec<Prompt>,
        permits: Vec<OwnedSemaphorePermit>,
        options: &GenerateOptions,
        max_tokens: usize,
        per_prompt: usize,
        log_probs: Option<usize>,
        score_prompt: bool,
    ) -> ApiResult<Events> {
        let (sender, events) = unbounded_channel();
        for (i, (prompt, permit)) in prompts.into_iter().zip(permits).enumerate() {
            let room = self.context - prompt.ids.len();
            let options = options.clone().max_tokens(max_tokens.min(room).min(self.limits.max_tokens));
            let first_choice = i * per_prompt;
            let choice = |choice: usize| options.clone().stream((first_choice + choice) as u64);
            let job = Job {
                prompt,
                choices: (0..per_prompt).map(choice).collect(),
                first_choice,
                log_probs,
                score_prompt,
                events: sender.clone(),
                deadline: Instant::now() + self.limits.timeout,
                permit: Some(permit),
            };
            self.engine.submit(job).map_err(|_| ApiError::stopping())?;
        }
        Ok(events)
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::sync::atomic::AtomicBool;
    use std::task::Poll;

    use super::*;

    #[test]
    fn who_leaves_keeps_a_place_until_the_queue_is_rid_of_the_work() {
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        let runtime = builder.worker_threads(1).max_blocking_threads(1).enable_all().build().unwrap();
        let (go, wait) = std::sync::mpsc::channel::<()>();
        runtime.spawn_blocking(move || wait.recv());
        let (places, done) = (Arc::new(Semaphore::new(1)), Arc::new(AtomicBool::new(false)));
        let (place, does) = (places.clone().try_acquire_owned().unwrap(), done.clone());
        let mut work = Box::pin(blocking(move || {
            does.store(true, Ordering::Relaxed);
            Ok(place)
        }));
        runtime.block_on(async {
            let pending = poll_fn(|context| Poll::Ready(work.as_mut().poll(context).is_pending()));
            assert!(pending.await);
            drop(work);
            assert_eq!(places.available_permits(), 0);
            go.send(()).unwrap();
            assert!(places.acquire().await.is_ok());
        });
        assert!(!done.load(Ordering::Relaxed));
    }
}
