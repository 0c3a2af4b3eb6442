"""Conversations: questions that a judge grades, and tasks solved in turns with Python as a tool.

Both are answered by anything that is a `Responder`; `deepen.evaluation.chat.live.LiveChat` is a loaded
model, or its base bypassed. Only that module needs torch.
"""

from deepen.evaluation.chat.endpoint import Endpoint
from deepen.evaluation.chat.episodes import Episode, play_tasks
from deepen.evaluation.chat.journal import Journal
from deepen.evaluation.chat.judge import Judge
from deepen.evaluation.chat.messages import Message, Responder
from deepen.evaluation.chat.question_scores import score_questions
from deepen.evaluation.chat.questions import Question, read_questions
from deepen.evaluation.chat.scored import Scored
from deepen.evaluation.chat.tool_scores import score_tools
from deepen.evaluation.chat.tool_tasks import ToolTask, read_tool_tasks

__all__ = [
    "Endpoint",
    "Episode",
    "Journal",
    "Judge",
    "Message",
    "Question",
    "Responder",
    "Scored",
    "ToolTask",
    "play_tasks",
    "read_questions",
    "read_tool_tasks",
    "score_questions",
    "score_tools",
]
