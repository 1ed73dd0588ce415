// The function that this service grew out of, as a web service on the usual stack of Node: it inserts the event id first,
// and ignores every later delivery of the event. It takes no lock and stores no payload, and an event whose handler
// fails, or whose process dies, is lost. So it does less for each event: it is here to be measured against.
//
// DATABASE_URL: a database of its own. SIGNING_SECRET: the endpoint's. It prints the port that it has taken.
import { drizzle } from "drizzle-orm/node-postgres";
import { integer, pgTable, text, timestamp } from "drizzle-orm/pg-core";
import express from "express";
import pg from "pg";
import Stripe from "stripe";

const CONNECTIONS = 20;
const stripe = new Stripe("sk_test_unused");

const processed = pgTable("processed_events", {
  id: text("id").primaryKey(),
  at: timestamp("at", { withTimezone: true }).notNull().defaultNow(),
});
const paymentFailures = pgTable("original_payment_failures", {
  eventId: text("event_id").notNull(),
  invoice: text("invoice").notNull(),
  customer: text("customer"),
  attempts: integer("attempts"),
});

const pool = new pg.Pool({ connectionString: process.env.DATABASE_URL, max: CONNECTIONS });
await pool.query(`
  CREATE TABLE processed_events (id text PRIMARY KEY, at timestamptz NOT NULL DEFAULT now());
  CREATE TABLE original_payment_failures (event_id text NOT NULL, invoice text NOT NULL, customer text, attempts int)`);
const database = drizzle(pool);

async function claim(id) {
  const rows = await database.insert(processed).values({ id }).onConflictDoNothing().returning({ id: processed.id });
  return rows.length === 1;
}

async function dispatch(event) {
  if (event.type !== "invoice.payment_failed") return "not_handled";
  const { id, customer, attempt_count } = event.data.object;
  await database.insert(paymentFailures).values({ eventId: event.id, invoice: id, customer, attempts: attempt_count });
  return "payment_failure_recorded";
}

const app = express();
app.post("/webhooks/stripe", express.raw({ type: "application/json", limit: "1mb" }), async (request, response) => {
  let event;
  try {
    event = stripe.webhooks.constructEvent(request.body, request.get("stripe-signature"), process.env.SIGNING_SECRET);
  } catch {
    response.status(400).json({ processed: false, action: "rejected" });
    return;
  }
  const first = await claim(event.id);
  response.json({ event_id: event.id, processed: first, action: first ? await dispatch(event) : "ignored" });
});
const listener = app.listen(0, "127.0.0.1", () => console.log(`http://127.0.0.1:${listener.address().port}`));
