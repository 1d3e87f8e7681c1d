from fedbn.auditing.audit import Audit as Audit
from fedbn.auditing.audit import audit as audit
from fedbn.config import Plan as Plan
from fedbn.data.population import Population as Population
from fedbn.errors import UserError as UserError
from fedbn.federation import Outcome as Outcome
from fedbn.federation.run import Run as Run
from fedbn.integrations.service_client import Client as Client
from fedbn.integrations.sklearn import PersonalizedClassifier as PersonalizedClassifier
from fedbn.nn.conversion import convert as convert
from fedbn.nn.roles import Role as Role
from fedbn.online import Personalized as Personalized
from fedbn.online import Rule as Rule
from fedbn.online import personalize as personalize
from fedbn.online import rule as rule
from fedbn.statistics.moments import Moments as Moments
from fedbn.strategies.base import NormStrategy as NormStrategy
from fedbn.strategies.ownership import Owner as Owner
from fedbn.tasks import Task as Task
from fedbn_simulations.api import adapt as adapt
from fedbn_simulations.api import compare as compare
from fedbn_simulations.api import federate as federate
from fedbn_simulations.api import load as load
from fedbn_simulations.engines.simulation import run_simulation as run_simulation

__all__: list[str]
