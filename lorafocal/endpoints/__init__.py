"""Questions to a server that speaks OpenAI's chat protocol, and the replies to them; none is paid for twice."""

from lorafocal.endpoints.asking import Replies, ask
from lorafocal.endpoints.endpoint import Endpoint, Question
from lorafocal.endpoints.reply import Reply
from lorafocal.endpoints.spending import Approve, Price, Spending, approved, estimate

__all__ = ["Approve", "Endpoint", "Price", "Question", "Replies", "Reply", "Spending", "approved", "ask", "estimate"]
