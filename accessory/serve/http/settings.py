"""What the HTTP server is told when it starts."""

from dataclasses import dataclass

from accessory.text.forms import Form

MEGABYTE = 2**20


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """How the API behaves.

    Attributes:
        api_key: what clients must send as "Authorization: Bearer KEY"; None lets everyone in.
        form: of chats; None: the one that lies with the tokenizer.
        model_name: the name of the model in requests and answers; None: the engine's.
        body_limit: bytes of a request's body at most.
        origins: of web pages whose scripts may ask, such as "https://example.org"; "*": of all.
    """

    api_key: str | None = None
    form: Form | None = None
    model_name: str | None = None
    body_limit: int = 4 * MEGABYTE
    origins: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"ServerSettings(form={self.form and self.form.name!r}, body_limit={self.body_limit})"
