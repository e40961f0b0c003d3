"""What the routes of a server share: its engine, once there is one, and what is made of it."""

from functools import cached_property

from fastapi import Request

from accessory.serve.http.errors import ApiError, unavailable
from accessory.serve.http.generation import Generations
from accessory.serve.http.metrics import Metrics
from accessory.serve.http.settings import ServerSettings
from accessory.serve.request import Engine
from accessory.serve.token_texts import TokenTexts
from accessory.text.form_files import find_form
from accessory.text.forms import Form

_LOADING = "the model is being loaded"


class ServerState:
    """A server's engine and settings.

    Attributes:
        settings: what the server was told.
        metrics, generations: what is measured, and who waits.
    """

    def __init__(self, engine: Engine | None, settings: ServerSettings) -> None:
        self.settings = settings
        self._engine: Engine | None = None
        self._form = settings.form
        self.metrics = Metrics(lambda: self._engine)
        self.generations = Generations(self.metrics)
        if engine is not None:
            self.load(engine)

    def load(self, engine: Engine) -> None:
        """Take the engine, now that its model is loaded."""
        self._form = self._form or find_form(engine.tokenizer, [])
        self._engine = engine

    @property
    def trouble(self) -> str | None:
        """Why no request can be answered now; None where they can."""
        if self._engine is None:
            return _LOADING
        if self._engine.ready:
            return None
        return self._engine.failure or _LOADING

    @property
    def engine(self) -> Engine:
        """The engine.

        Raises:
            ApiError: 503 while there is none, or its ranks are lost.
        """
        if self._engine is None or self.trouble is not None:
            raise unavailable(self.trouble or _LOADING)
        return self._engine

    @property
    def name(self) -> str:
        """The model's name in requests and answers; ApiError 503 before it is loaded."""
        if self._engine is None:
            raise unavailable(_LOADING)
        return self.settings.model_name or self._engine.name

    @cached_property
    def texts(self) -> TokenTexts:
        """The texts of the model's tokens."""
        return TokenTexts(self.engine.tokenizer)

    @property
    def form(self) -> Form:
        """The form that chats are put into; ApiError 503 before the model is loaded."""
        if self._form is None or self._engine is None:
            raise unavailable(_LOADING)
        return self._form

    def check_model(self, asked: str | None) -> None:
        """Refuse a request for another model.

        Raises:
            ApiError: 404.
        """
        if asked is not None and asked != self.name:
            message = f"there is no model {asked!r} here, only {self.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")


def state_of(request: Request) -> ServerState:
    """The state of the server that a request came to."""
    state: ServerState = request.app.state.server
    return state
