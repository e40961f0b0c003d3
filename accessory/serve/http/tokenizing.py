"""Text to tokens and back, in vLLM's form, which lm-evaluation-harness and other clients ask for."""

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from accessory.serve.http.answers import Text, TokenizerInfo, Tokens
from accessory.serve.http.documented import failures
from accessory.serve.http.jobs import check_ids, encode_text, prepared, prompt_of_chat
from accessory.serve.http.schema import DetokenizeRequest, TokenizeRequest
from accessory.serve.http.state import state_of
from accessory.text.equivalents import equivalent_template
from accessory.text.tokenizer import Tokenizer

router = APIRouter(tags=["tokens"])
_FAILURES = failures(400, 401, 404, 408, 413, 415, 503)
# A text may be longer than the context here; it is bounded by the size of the body, too.
_MOST_TOKENS = 2**20


@router.post("/tokenize", response_model=Tokens, responses=_FAILURES)
async def tokenize(body: TokenizeRequest, request: Request) -> Response:
    """The tokens of a text, or of a chat as it is put to the model.

    A text is taken literally. But clients find the begin and end tokens by asking for their names alone, so these
    stand for the tokens.
    """
    state = state_of(request)
    state.check_model(body.model)
    if body.messages is not None:
        tokens, _ = await prompt_of_chat(state.form, body.messages, body, limit=_MOST_TOKENS)
    else:
        assert body.prompt is not None
        bos = body.add_special_tokens is not False
        tokens = await prepared(len(body.prompt), _encode, state.engine.tokenizer, body.prompt, bos)
    limit = state.engine.args.max_seq_len
    return JSONResponse({"count": len(tokens), "max_model_len": limit, "tokens": tokens})


def _encode(tokenizer: Tokenizer, text: str, bos: bool) -> list[int]:
    ends = (tokenizer.bos_id, tokenizer.eos_id)
    names = {tokenizer.name(token): token for token in ends if token is not None}
    return [names[text]] if text in names else encode_text(tokenizer, text, bos=bos, limit=_MOST_TOKENS, param="prompt")


@router.post("/detokenize", response_model=Text, responses=_FAILURES)
async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
    """The text of tokens; control tokens have none."""
    state = state_of(request)
    state.check_model(body.model)
    tokenizer = state.engine.tokenizer

    def decode() -> str:
        check_ids(tokenizer, body.tokens, "tokens")
        return tokenizer.decode(body.tokens)

    text = await prepared(len(body.tokens), decode)
    return JSONResponse({"prompt": text})


@router.get("/tokenizer_info", response_model=TokenizerInfo, responses=failures(401, 503))
async def tokenizer_info(request: Request) -> Response:
    """What the tokenizer calls its begin and end tokens, and the form of chats as a chat template."""
    state = state_of(request)
    tokenizer = state.engine.tokenizer
    return JSONResponse(
        {
            "tokenizer_class": type(tokenizer).__name__,
            "bos_token": tokenizer.names.get("bos_token"),
            "eos_token": tokenizer.name(tokenizer.eos_id),
            "vocab_size": tokenizer.n_words,
            "chat_template": equivalent_template(state.form),
        }
    )
