"""The shop's tables."""

from sqlalchemy import ForeignKey, Text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship


class Base(DeclarativeBase):
    """All models of the shop."""

    type_annotation_map = {str: Text}  # noqa: RUF012


class Customer(Base):
    """Somebody who buys."""

    __tablename__ = "customers"
    id: Mapped[str] = mapped_column(primary_key=True)
    email: Mapped[str | None]
    access: Mapped[list["Access"]] = relationship(back_populates="customer")


class Access(Base):
    """What a customer has paid for."""

    __tablename__ = "access"
    invoice: Mapped[str] = mapped_column(primary_key=True)
    customer_id: Mapped[str] = mapped_column(ForeignKey("customers.id"))
    customer: Mapped[Customer] = relationship(back_populates="access")
